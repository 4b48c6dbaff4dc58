//! Giving up capabilities (capabilities(7)). They belong to a thread: threads
//! that it starts later have what it has.

use std::io;

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs,
};

/// Leaves the calling thread no other capability than these, for good: together
/// with no_new_privs, which is set as well, no program it executes gets them back.
///
/// # Errors
/// As capset(2) and prctl(2).
pub fn limit_to(wanted: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    let has = capabilities(None)?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: has.effective & wanted,
            permitted: has.permitted & wanted,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_up_does_not_come_back() {
        std::thread::spawn(|| {
            let before = capabilities(None).unwrap().permitted;
            limit_to(CapabilitySet::CHOWN).unwrap();
            let left = capabilities(None).unwrap();
            assert_eq!(left.permitted, before & CapabilitySet::CHOWN);
            assert_eq!(left.effective, left.permitted);
            let all = CapabilitySets {
                effective: before,
                permitted: before,
                inheritable: CapabilitySet::empty(),
            };
            assert_eq!(
                set_capabilities(None, all).is_ok(),
                left.permitted == before
            );
        })
        .join()
        .unwrap();
    }
}
