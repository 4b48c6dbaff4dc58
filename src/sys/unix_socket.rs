//! Unix sockets in a directory given by descriptor.
//!
//! `sun_path` holds 108 bytes, and a sandbox directory below containerd's root
//! with a 64 digit id is longer than that. `/proc/self/fd/N/name` is not.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};

/// Opens a directory for [`bind`] and [`connect`].
///
/// # Errors
/// As open(2).
pub fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}

/// A path for `name` in `dir` that fits into `sun_path`, as long as `dir` is open.
#[must_use]
pub fn short_path(dir: BorrowedFd<'_>, name: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()).into()
}

/// Listens on the stream socket `name` in `dir`.
///
/// # Errors
/// As bind(2).
pub fn bind(dir: BorrowedFd<'_>, name: &str) -> io::Result<UnixListener> {
    UnixListener::bind(short_path(dir, name))
}

/// Connects to the stream socket `name` in `dir`.
///
/// # Errors
/// As connect(2).
pub fn connect(dir: BorrowedFd<'_>, name: &str) -> io::Result<UnixStream> {
    UnixStream::connect(short_path(dir, name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_directory_longer_than_sun_path_is_no_obstacle() {
        let parent = tempfile::tempdir().unwrap();
        let long = parent.path().join("d".repeat(200));
        std::fs::create_dir(&long).unwrap();
        let dir = open_dir(&long).unwrap();
        let listener = bind(dir.as_fd(), "x.sock").unwrap();
        connect(dir.as_fd(), "x.sock").unwrap();
        listener.accept().unwrap();
    }
}
