//! What sysfs tells of the interfaces of a network namespace, and device nodes that
//! nobody else has to have.
//!
//! A mounted sysfs shows the interfaces of the namespace its mounter was in. The one
//! here is mounted nowhere: it is a descriptor (fsmount(2)) that a thread makes
//! while it still may, and uses afterwards.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, mknodat, openat, readlinkat, unlinkat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// Longest file that is read, in bytes; the kernel's are a page.
const MAX_FILE: u64 = 4096;

/// See the module's header.
#[derive(Debug)]
pub struct Sysfs {
    sys: OwnedFd,
    /// A file system for device nodes.
    nodes: Option<OwnedFd>,
}

impl Sysfs {
    /// sysfs as the network namespace of the calling thread has it, which needs
    /// `CAP_SYS_ADMIN`.
    ///
    /// # Errors
    /// As fsopen(2).
    pub fn mount() -> io::Result<Sysfs> {
        Ok(Sysfs {
            sys: mount("sysfs")?,
            nodes: Some(mount("tmpfs")?),
        })
    }

    /// A directory that is mounted, such as the host's own sysfs. It has no device nodes
    /// to open.
    ///
    /// # Errors
    /// As open(2).
    pub fn at(path: &Path) -> io::Result<Sysfs> {
        Ok(Sysfs {
            sys: crate::sys::unix_socket::open_dir(path)?,
            nodes: None,
        })
    }

    /// The contents of a file without the newline.
    ///
    /// # Errors
    /// As open(2) and read(2).
    pub fn read(&self, path: impl AsRef<Path>) -> io::Result<String> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = File::from(openat(&self.sys, path.as_ref(), flags, Mode::empty())?);
        let mut text = String::new();
        file.take(MAX_FILE).read_to_string(&mut text)?;
        Ok(text.trim_end().to_owned())
    }

    /// Whether there is something of this name.
    #[must_use]
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        rustix::fs::statat(&self.sys, path.as_ref(), rustix::fs::AtFlags::empty()).is_ok()
    }

    /// Writes to a file.
    ///
    /// # Errors
    /// As open(2) and write(2).
    pub fn write(&self, path: impl AsRef<Path>, text: &str) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(&self.sys, path.as_ref(), flags, Mode::empty())?;
        // sysfs takes a value in one write.
        rustix::io::write(&file, text.as_bytes())?;
        Ok(())
    }

    /// Where a symbolic link leads; `None` when there is none.
    ///
    /// # Errors
    /// As readlink(2).
    pub fn link(&self, path: impl AsRef<Path>) -> io::Result<Option<PathBuf>> {
        match readlinkat(&self.sys, path.as_ref(), Vec::new()) {
            Ok(target) => Ok(Some(PathBuf::from(
                String::from_utf8_lossy(target.as_bytes()).into_owned(),
            ))),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::INVAL) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Opens the character device that a `dev` file names ("major:minor"), as
    /// often as asked for, which needs `CAP_MKNOD`.
    ///
    /// # Errors
    /// As mknod(2) and open(2); `InvalidData` for anything else in the file.
    pub fn open_device(&self, dev: impl AsRef<Path>, count: u32) -> io::Result<Vec<OwnedFd>> {
        let nodes = self.nodes.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let text = self.read(dev)?;
        let numbers = text
            .split_once(':')
            .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let (major, minor) = numbers.ok_or(io::ErrorKind::InvalidData)?;
        let device = rustix::fs::makedev(major, minor);
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(nodes, "node", FileType::CharacterDevice, mode, device)?;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened: Result<Vec<_>, _> = (0..count)
            .map(|_| openat(nodes, "node", flags, Mode::empty()))
            .collect();
        unlinkat(nodes, "node", rustix::fs::AtFlags::empty())?;
        Ok(opened?)
    }
}

/// A file system of this kind that is mounted nowhere. What it shows of networks is
/// that of the calling thread.
///
/// # Errors
/// As fsopen(2).
pub fn mount(kind: &str) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}
