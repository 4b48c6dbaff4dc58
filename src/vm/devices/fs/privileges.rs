//! Set-user-id and set-group-id bits of files that somebody else writes to.
//!
//! The kernel clears these bits when a process without `CAP_FSETID` writes to or
//! truncates a file. The serving thread has the capability, so it has to do
//! without while it acts for a process that has not. Letting the host do it spares
//! the guest a question before every write.
//!
//! The file server can do this itself, but works with a copy of the thread's
//! capabilities that is out of date after it has acted for a user, and then leaves
//! the bits alone.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// As long as it lives, the calling thread acts without `CAP_FSETID`.
#[derive(Debug)]
pub struct WithoutFsetid {
    before: Option<CapabilitySets>,
}

impl WithoutFsetid {
    /// Gives up the capability if `needed`.
    ///
    /// # Errors
    /// Those of capget(2) and capset(2).
    pub fn when(needed: bool) -> io::Result<Self> {
        if !needed {
            return Ok(Self { before: None });
        }
        let before = capabilities(None)?;
        let mut without = before;
        without.effective.remove(CapabilitySet::FSETID);
        set_capabilities(None, without)?;
        Ok(Self {
            before: Some(before),
        })
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // The capability is still permitted, so it can be taken up again.
            if let Err(e) = set_capabilities(None, before) {
                log::error!("fs: cannot restore capabilities: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has_fsetid() -> bool {
        let sets = capabilities(None).unwrap();
        sets.effective.contains(CapabilitySet::FSETID)
    }

    #[test]
    fn the_capability_comes_back() {
        let before = has_fsetid();
        drop(WithoutFsetid::when(false).unwrap());
        let without = WithoutFsetid::when(true).unwrap();
        assert!(!has_fsetid());
        drop(without);
        assert_eq!(has_fsetid(), before);
    }
}
