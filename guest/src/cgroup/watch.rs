//! A control file whose changes the kernel announces (`cgroup.events`,
//! `memory.events`): poll(2) reports them as priority data.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Longest content, in bytes; the files have a few short lines.
const MAX_LEN: usize = 4096;

/// An open control file.
pub struct Watch {
    file: File,
    changes: AsyncFd<OwnedFd>,
}

impl Watch {
    /// # Errors
    /// Of open(2), and of registering with epoll.
    pub fn open(path: &Path) -> io::Result<Watch> {
        let file = File::open(path)?;
        let same = file.as_fd().try_clone_to_owned()?;
        Ok(Watch {
            file,
            changes: sys::on_runtime(same, Interest::PRIORITY)?,
        })
    }

    /// The number behind a key; 0 when there is no such line.
    ///
    /// # Errors
    /// Of read(2).
    pub fn value(&self, key: &str) -> io::Result<u64> {
        let mut content = [0; MAX_LEN];
        let len = self.file.read_at(&mut content, 0)?;
        Ok(value_of(&String::from_utf8_lossy(&content[..len]), key))
    }

    /// Waits for a change since the content was read last. May return without one.
    ///
    /// # Errors
    /// Of epoll.
    pub async fn changed(&self) -> io::Result<()> {
        self.changes.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

/// The number behind a key of a flat keyed file.
pub fn value_of(content: &str, key: &str) -> u64 {
    content
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_whole_words() {
        let content = "oom 3\noom_kill 2\nlow max\n";
        assert_eq!(value_of(content, "oom"), 3);
        assert_eq!(value_of(content, "oom_kill"), 2);
        assert_eq!(value_of(content, "low"), 0);
        assert_eq!(value_of(content, "kill"), 0);
    }
}
