//! Advisory locks on directories.
//!
//! The lock is a flock(2) on the directory itself, so there is no lock file to
//! create or to forget, and it goes away with the process that held it. A
//! directory may be removed by the holder: whoever waited for it then finds
//! that the path is gone.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// A held lock; released when dropped.
#[derive(Debug)]
pub struct DirLock {
    _dir: File,
}

/// How long a waiter sleeps between two tries. flock(2) has no time-out of its
/// own, and a signal to interrupt it would be global to the process.
const RETRY: Duration = Duration::from_millis(5);

impl DirLock {
    /// Waits for the exclusive lock of `path`.
    ///
    /// # Errors
    /// `NotFound` when the directory does not exist or is removed meanwhile,
    /// `TimedOut` when another process holds the lock all the time.
    pub fn acquire(path: &Path, deadline: Duration) -> io::Result<DirLock> {
        Self::take(path, FlockOperation::NonBlockingLockExclusive, deadline)
    }

    /// Waits for a lock of `path` that other holders of such locks do not exclude.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    pub fn acquire_shared(path: &Path, deadline: Duration) -> io::Result<DirLock> {
        Self::take(path, FlockOperation::NonBlockingLockShared, deadline)
    }

    fn take(path: &Path, operation: FlockOperation, deadline: Duration) -> io::Result<DirLock> {
        let end = Instant::now() + deadline;
        loop {
            let dir = File::open(path)?;
            match flock(dir.as_fd(), operation) {
                Ok(()) => {
                    // The directory may have been removed, or removed and made
                    // anew, between open and flock.
                    let (locked, current) = (dir.metadata()?, std::fs::metadata(path)?);
                    if (locked.dev(), locked.ino()) == (current.dev(), current.ino()) {
                        return Ok(DirLock { _dir: dir });
                    }
                }
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                    if Instant::now() >= end {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    std::thread::sleep(RETRY);
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_waits_and_a_removed_directory_is_not_found() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("c1");
        std::fs::create_dir(&dir).unwrap();
        let held = DirLock::acquire(&dir, Duration::ZERO).unwrap();
        let busy = DirLock::acquire(&dir, Duration::from_millis(20)).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::TimedOut);
        let shared = DirLock::acquire_shared(&dir, Duration::ZERO).unwrap_err();
        assert_eq!(shared.kind(), io::ErrorKind::TimedOut);
        let waiter = {
            let dir = dir.clone();
            std::thread::spawn(move || DirLock::acquire(&dir, Duration::from_secs(10)))
        };
        std::fs::remove_dir(&dir).unwrap();
        drop(held);
        let gone = waiter.join().unwrap().unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn shared_locks_exclude_only_the_exclusive_one() {
        let dir = tempfile::tempdir().unwrap();
        let first = DirLock::acquire_shared(dir.path(), Duration::ZERO).unwrap();
        let second = DirLock::acquire_shared(dir.path(), Duration::ZERO).unwrap();
        drop(first);
        assert!(DirLock::acquire(dir.path(), Duration::ZERO).is_err());
        drop(second);
        assert!(DirLock::acquire(dir.path(), Duration::ZERO).is_ok());
    }
}
