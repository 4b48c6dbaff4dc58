//! Namespaces as open files.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, open, stat};

/// Which namespace it is; unique while it exists (namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id {
    dev: u64,
    ino: u64,
}

/// An open namespace, which exists as long as this value.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
    id: Id,
}

impl Namespace {
    /// Opens a namespace of the kind that `clone_flag` (`CLONE_NEW...`) names.
    ///
    /// # Errors
    /// As open(2); `InvalidInput` for anything else.
    pub fn open(path: &Path, clone_flag: i32) -> io::Result<Namespace> {
        /// `_IO(0xb7, 3)`, see ioctl_ns(2).
        const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
        // A fifo must not make this wait.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = open(path, flags, Mode::empty())?;
        // SAFETY: this request takes no argument.
        let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
        if kind != clone_flag {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let stat = rustix::fs::fstat(fd.as_fd())?;
        Ok(Namespace {
            fd,
            id: Id {
                dev: stat.st_dev,
                ino: stat.st_ino,
            },
        })
    }

    #[must_use]
    pub fn id(&self) -> Id {
        self.id
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The namespace at a path now.
///
/// # Errors
/// As stat(2).
pub fn id_at(path: &Path) -> io::Result<Id> {
    let stat = stat(path)?;
    Ok(Id {
        dev: stat.st_dev,
        ino: stat.st_ino,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_known_by_its_id_and_its_kind() {
        let path = Path::new("/proc/self/ns/uts");
        let own = Namespace::open(path, libc::CLONE_NEWUTS).unwrap();
        assert_eq!(own.id(), id_at(path).unwrap());
        assert_ne!(own.id(), id_at(Path::new("/proc/self/ns/ipc")).unwrap());
        for (path, flag) in [
            (path, libc::CLONE_NEWIPC),
            (Path::new("/etc/passwd"), libc::CLONE_NEWUTS),
        ] {
            let error = Namespace::open(path, flag).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
    }
}
