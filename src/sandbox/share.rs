//! The pod's shared directory: what the guest sees over virtio-fs.
//!
//! A small tmpfs in the sandboxer's private mount namespace holds mount points
//! only, `<container>/<name>`, and the containers' rootfs and volumes are
//! attached to them. Nothing of it is visible to the rest of the host, and all
//! of it goes away with the sandboxer.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::sys::mount as mounts;

/// What the tmpfs may hold: mount points, and what a hostile guest puts there.
const TMPFS_OPTIONS: &str = "mode=0755,size=4m,nr_inodes=16k";

#[derive(Debug)]
pub struct Share {
    dir: PathBuf,
}

impl Share {
    /// Enters a mount namespace of its own and mounts the directory there.
    /// Later mounts of the host still arrive.
    ///
    /// # Errors
    /// As unshare(2) and mount(2).
    pub fn create(dir: PathBuf) -> io::Result<Share> {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
        crate::root::create_private_dir(&dir)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(
            Some("tmpfs"),
            &dir,
            Some("tmpfs"),
            flags,
            Some(TMPFS_OPTIONS),
        )?;
        Ok(Share { dir })
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Attaches a cloned mount tree at `<container>/<name>`.
    ///
    /// # Errors
    /// `InvalidInput` for names that are not plain file names, `AlreadyExists`,
    /// else as move_mount(2).
    pub fn attach(&self, container: &str, name: &str, tree: BorrowedFd<'_>) -> io::Result<()> {
        let dir = self.dir.join(plain(container)?);
        let target = dir.join(plain(name)?);
        match fs::create_dir(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        if mounts::is_dir(tree)? {
            fs::create_dir(&target)?;
        } else {
            fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&target)?;
        }
        let root = crate::sys::unix_socket::open_dir(&self.dir)?;
        // The guest can write to the directory: no link of its making is followed.
        let point = mounts::open_in_root(root.as_fd(), &Path::new(container).join(name))?;
        mounts::attach(tree, point.as_fd(), Path::new(""))
    }
}

/// A name that is one component of a path.
fn plain(name: &str) -> io::Result<&str> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} is not a file name"),
        ));
    }
    Ok(name)
}
