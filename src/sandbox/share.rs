//! The pod's shared directory: what the guest sees over virtio-fs.
//!
//! A small tmpfs in the sandboxer's private mount namespace holds mount points
//! only, `<container>/<name>`, and the containers' rootfs and volumes are
//! attached to them. Nothing of it is visible to the rest of the host, and all
//! of it goes away with the sandboxer, or with [`Share::detach`] when a container
//! leaves before the others.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, unlinkat};
use rustix::io::Errno;

use crate::sys::mount as mounts;

/// What the tmpfs may hold: mount points, and what a hostile guest puts there.
const TMPFS_OPTIONS: &str = "mode=0755,size=4m,nr_inodes=16k";

#[derive(Debug)]
pub struct Share {
    dir: PathBuf,
    /// What is attached, by container: the names, and whether each is a directory.
    attached: HashMap<String, Vec<(String, bool)>>,
}

impl Share {
    /// Enters a mount namespace of its own ([`enter_namespace`]) and mounts the
    /// directory there.
    ///
    /// # Errors
    /// As unshare(2) and mount(2).
    pub fn create(dir: PathBuf, writable: &[&Path]) -> io::Result<Share> {
        enter_namespace(writable)?;
        crate::root::create_private_dir(&dir)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(
            Some("tmpfs"),
            &dir,
            Some("tmpfs"),
            flags,
            Some(TMPFS_OPTIONS),
        )?;
        Ok(Share {
            dir,
            attached: HashMap::new(),
        })
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
    pub fn attach(&mut self, container: &str, name: &str, tree: BorrowedFd<'_>) -> io::Result<()> {
        let (container, name) = (plain(container)?, plain(name)?);
        // The guest can write to the directory, so it may have put anything in it:
        // each step is taken from an open directory, and no link is followed.
        let root = crate::sys::unix_socket::open_dir(&self.dir)?;
        match mkdirat(&root, container, DIR_MODE) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        let dir = mounts::open_entry(root.as_fd(), container)?;
        let is_dir = mounts::is_dir(tree)?;
        if is_dir {
            mkdirat(&dir, name, DIR_MODE)?;
        } else {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            openat(&dir, name, flags | OFlags::NOFOLLOW, FILE_MODE)?;
        }
        let known = self.attached.entry(container.to_owned()).or_default();
        known.push((name.to_owned(), is_dir));
        let point = mounts::open_entry(dir.as_fd(), name)?;
        mounts::attach(tree, point.as_fd(), Path::new(""))
    }

    /// Takes away all that was attached for a container. What the guest has open
    /// of it stays until the guest has looked for it again.
    ///
    /// # Errors
    /// As umount2(2), unlinkat(2); the rest has been taken away then. Nothing was
    /// attached: no error.
    pub fn detach(&mut self, container: &str) -> io::Result<()> {
        let Some(names) = self.attached.remove(container) else {
            return Ok(());
        };
        let root = crate::sys::unix_socket::open_dir(&self.dir)?;
        let dir = mounts::open_entry(root.as_fd(), container)?;
        let mut result = Ok(());
        // Newest first: one may be below another.
        for (name, is_dir) in names.into_iter().rev() {
            let gone = detach_one(&dir, &name, is_dir);
            if result.is_ok() {
                result = gone.map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")));
            }
        }
        match unlinkat(&root, container, AtFlags::REMOVEDIR) {
            // The guest has put something there: it fills its own share.
            Ok(()) | Err(Errno::NOTEMPTY | Errno::NOENT) => result,
            Err(e) => result.and(Err(e.into())),
        }
    }
}

fn detach_one(dir: &OwnedFd, name: &str, is_dir: bool) -> io::Result<()> {
    // A mount point cannot be renamed or removed, so this is what was attached; if
    // attaching failed it may be anything, but no link is followed.
    let path = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
    match umount2(
        path.as_str(),
        MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
    ) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(e) => return Err(e.into()),
    }
    let flags = if is_dir {
        AtFlags::REMOVEDIR
    } else {
        AtFlags::empty()
    };
    match unlinkat(dir, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Enters a mount namespace in which the host's file systems are read-only, except
/// for these directories: whatever this process opens or executes, and hands on to
/// the hypervisor, is no way to write to the host. Later mounts of the host arrive.
fn enter_namespace(writable: &[&Path]) -> io::Result<()> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    let trees = writable
        .iter()
        .map(|path| mounts::clone_path(path, false))
        .collect::<io::Result<Vec<_>>>()?;
    let root = crate::sys::unix_socket::open_dir(Path::new("/"))?;
    mounts::set_read_only(root.as_fd(), true)?;
    for (path, tree) in writable.iter().zip(trees) {
        let place = crate::sys::unix_socket::open_dir(path)?;
        mounts::attach(tree.as_fd(), place.as_fd(), Path::new(""))?;
    }
    Ok(())
}

/// 0755 and 0644, less the umask.
const DIR_MODE: Mode = Mode::from_raw_mode(0o755);
const FILE_MODE: Mode = Mode::from_raw_mode(0o644);

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_the_guest_has_put_there_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("share"), dir.path().join("outside"));
        fs::create_dir_all(inside.join("c2")).unwrap();
        fs::create_dir(&outside).unwrap();
        symlink(&outside, inside.join("c1")).unwrap();
        symlink(outside.join("made"), inside.join("c2/rootfs")).unwrap();
        let mut share = Share {
            dir: inside,
            attached: HashMap::new(),
        };
        let tree = crate::sys::unix_socket::open_dir(dir.path()).unwrap();
        let file: OwnedFd = fs::File::open("/dev/null").unwrap().into();
        for (container, errno) in [("c1", libc::ELOOP), ("c2", libc::EEXIST)] {
            for what in [&tree, &file] {
                let error = share.attach(container, "rootfs", what.as_fd()).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(errno), "{container}");
            }
        }
        for name in ["", ".", "..", "a/b"] {
            let error = share.attach("c2", name, tree.as_fd()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }
}
