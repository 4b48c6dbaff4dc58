//! This program's binary, for processes whose `/proc/PID/exe` others can get at.
//!
//! A process in the mount namespace of a container is a way to the binary it
//! executes (CVE-2019-5736): whoever opens `/proc/PID/exe` for writing, at the
//! latest after the process has ended, can replace the runtime on the host. So
//! such a process executes it through a mount of its own which is read-only and
//! attached nowhere. That costs two system calls and no memory, and the pages of
//! all processes stay shared. Where that mount cannot be made, a sealed copy in
//! memory takes its place.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::mount;

const PATH: &str = "/proc/self/exe";

/// A descriptor to execute that leads to nothing that can be written.
///
/// # Errors
/// When neither a read-only mount nor a sealed copy can be made.
pub fn read_only() -> io::Result<OwnedFd> {
    mount::clone_read_only(PATH.as_ref()).or_else(|_| sealed_copy())
}

fn sealed_copy() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know that flag and need none.
    let copy = memfd_create("kuasar-runv", flags | MemfdFlags::EXEC)
        .or_else(|_| memfd_create("kuasar-runv", flags))?;
    let mut copy = File::from(copy);
    io::copy(&mut File::open(PATH)?, &mut copy)?;
    copy.rewind()?;
    fcntl_add_seals(
        copy.as_fd(),
        SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
    )?;
    Ok(copy.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    /// What opening it for writing through /proc answers.
    fn write_error(fd: &OwnedFd) -> Option<i32> {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let opened = File::options().write(true).open(path);
        let written = opened.and_then(|mut file| io::Write::write_all(&mut file, b"x"));
        written.unwrap_err().raw_os_error()
    }

    #[test]
    fn neither_form_can_be_written() {
        // This binary is being executed, which may be an obstacle of its own.
        let mount = mount::clone_read_only(PATH.as_ref()).unwrap();
        let refused = [Some(libc::EROFS), Some(libc::ETXTBSY)];
        assert!(refused.contains(&write_error(&mount)));
        let file = tempfile::NamedTempFile::new().unwrap();
        let mount = mount::clone_read_only(file.path()).unwrap();
        assert_eq!(write_error(&mount), Some(libc::EROFS));
        let copy = sealed_copy().unwrap();
        assert_eq!(write_error(&copy), Some(libc::EPERM));
        let original = std::fs::metadata(PATH).unwrap().len();
        assert_eq!(File::from(copy).metadata().unwrap().len(), original);
    }
}
