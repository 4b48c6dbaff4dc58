//! The pod's shared directory: what the guest sees over virtio-fs.
//!
//! A small tmpfs in the sandboxer's private mount namespace holds mount points
//! only: `<container>/<name>` for what is the container's alone, as its rootfs,
//! and `@volumes/<name>` for the pod's [`volumes`]. Nothing of it is visible to the
//! rest of the host, and all of it goes away with the sandboxer.

mod volumes;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kuasar_runv_protocol::VOLUMES_DIR;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, unlinkat};
use rustix::io::Errno;

use self::volumes::Volumes;
use crate::sys::mount as mounts;

/// What the tmpfs may hold: mount points, and what a hostile guest puts there.
const TMPFS_OPTIONS: &str = "mode=0755,size=4m,nr_inodes=16k";

#[derive(Debug)]
pub struct Share {
    dir: PathBuf,
    volumes: Volumes,
    /// What is each container's alone: name and mount.
    own: HashMap<String, Vec<(String, OwnedFd)>>,
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
        Ok(Share::at(dir))
    }

    fn at(dir: PathBuf) -> Share {
        Share {
            dir,
            volumes: Volumes::default(),
            own: HashMap::new(),
        }
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
    pub fn attach(&mut self, container: &str, name: &str, tree: OwnedFd) -> io::Result<()> {
        self.attach_at(container, name, tree.as_fd())?;
        let own = self.own.entry(container.to_owned()).or_default();
        own.push((name.to_owned(), tree));
        Ok(())
    }

    /// Lets a container use the volume `@volumes/<name>`; a cloned mount tree of its
    /// source is attached there unless another container's is.
    ///
    /// # Errors
    /// As [`attach`](Self::attach); see [`Volumes::share`].
    pub fn attach_volume(
        &mut self,
        container: &str,
        name: &str,
        writes: bool,
        tree: OwnedFd,
    ) -> io::Result<()> {
        let container = plain(container)?;
        if self.volumes.share(name, container, writes, tree.as_fd())? {
            return Ok(());
        }
        self.attach_at(VOLUMES_DIR, name, tree.as_fd())?;
        self.volumes.insert(name, container, writes, tree);
        Ok(())
    }

    /// Takes one of a container's away again, if it is there.
    pub fn withdraw(&mut self, container: &str, name: &str) {
        let Some(own) = self.own.get_mut(container) else {
            return;
        };
        let Some(index) = own.iter().position(|(own, _)| own == name) else {
            return;
        };
        let (_, mount) = own.swap_remove(index);
        self.detach(container, name, mount);
    }

    /// Takes away what is a container's, and the volumes that no other uses; returns
    /// the paths of those in the directory. Does what can be done, whatever fails.
    pub fn release(&mut self, container: &str) -> Vec<PathBuf> {
        for (name, mount) in self.own.remove(container).unwrap_or_default() {
            self.detach(container, &name, mount);
        }
        // Not empty, or never there.
        if let Ok(root) = crate::sys::unix_socket::open_dir(&self.dir) {
            let _ = unlinkat(&root, container, AtFlags::REMOVEDIR);
        }
        let mut gone = Vec::new();
        for (name, mount) in self.volumes.release(container) {
            self.detach(VOLUMES_DIR, &name, mount);
            gone.push(Path::new(VOLUMES_DIR).join(name));
        }
        gone
    }

    fn detach(&self, dir: &str, name: &str, mount: OwnedFd) {
        if let Err(e) = self.detach_at(dir, name, mount) {
            log::warn!("taking {dir}/{name} out of the shared directory: {e}");
        }
    }

    fn attach_at(&self, dir: &str, name: &str, tree: BorrowedFd<'_>) -> io::Result<()> {
        let (dir, name) = (plain(dir)?, plain(name)?);
        // The guest can write to the directory, so it may have put anything in it:
        // each step is taken from an open directory, and no link is followed.
        let root = crate::sys::unix_socket::open_dir(&self.dir)?;
        match mkdirat(&root, dir, DIR_MODE) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        let dir = mounts::open_entry(root.as_fd(), dir)?;
        if mounts::is_dir(tree)? {
            mkdirat(&dir, name, DIR_MODE)?;
        } else {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            openat(&dir, name, flags | OFlags::NOFOLLOW, FILE_MODE)?;
        }
        let attached = mounts::open_entry(dir.as_fd(), name)
            .and_then(|point| mounts::attach(tree, point.as_fd(), Path::new("")));
        if attached.is_err() {
            // The name is to be free for the next time; the error is what matters.
            let _ = unlinkat(&dir, name, removal_of(tree)?);
        }
        attached
    }

    fn detach_at(&self, dir: &str, name: &str, mount: OwnedFd) -> io::Result<()> {
        let remove = removal_of(mount.as_fd())?;
        mounts::detach(mount.as_fd())?;
        drop(mount);
        let root = crate::sys::unix_socket::open_dir(&self.dir)?;
        let dir = mounts::open_entry(root.as_fd(), dir)?;
        Ok(unlinkat(&dir, name, remove)?)
    }
}

/// How the mount point of a tree is removed.
fn removal_of(tree: BorrowedFd<'_>) -> io::Result<AtFlags> {
    Ok(match mounts::is_dir(tree)? {
        true => AtFlags::REMOVEDIR,
        false => AtFlags::empty(),
    })
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
        let mut share = Share::at(inside);
        let tree = crate::sys::unix_socket::open_dir(dir.path()).unwrap();
        let file: OwnedFd = fs::File::open("/dev/null").unwrap().into();
        for (container, errno) in [("c1", libc::ELOOP), ("c2", libc::EEXIST)] {
            for what in [&tree, &file] {
                let what = what.try_clone().unwrap();
                let error = share.attach(container, "rootfs", what).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(errno), "{container}");
            }
        }
        for name in ["", ".", "..", "a/b"] {
            let what = tree.try_clone().unwrap();
            let error = share.attach("c2", name, what).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }
}
