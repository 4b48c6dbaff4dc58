//! Mounts as file descriptors: open_tree(2), move_mount(2), mount_setattr(2),
//! and paths that are resolved inside a root (openat2(2)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// Clones the mount at an absolute host path, with everything mounted below it
/// where `recursive`. The clone is attached nowhere until [`attach`], and goes away with
/// the descriptor. It receives later mounts of the original (slave) and sends
/// none back.
///
/// # Errors
/// As open_tree(2).
pub fn clone_path(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, path, flags)?;
    let slave = MountAttr {
        propagation: libc::MS_SLAVE,
        ..MountAttr::default()
    };
    mount_setattr(tree.as_fd(), libc::AT_RECURSIVE, &slave)?;
    Ok(tree)
}

/// Clones the mount at `path` (which may be a file) without what is mounted below
/// it. Through the clone nothing can be written.
///
/// # Errors
/// As open_tree(2) and mount_setattr(2).
pub fn clone_read_only(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags)?;
    set_read_only(tree.as_fd(), false)?;
    Ok(tree)
}

/// Clones the mount of an open file, with that file as its root.
///
/// # Errors
/// As open_tree(2); `EINVAL` when the file is in no mount of this mount namespace.
pub fn clone_file(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(file, "", flags)?;
    set_private(tree.as_fd())?;
    Ok(tree)
}

/// Attaches a cloned tree at `path` below `dir`; an empty path is `dir` itself.
///
/// # Errors
/// As move_mount(2).
pub fn attach(tree: BorrowedFd<'_>, dir: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if path.as_os_str().is_empty() {
        flags |= MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    }
    Ok(move_mount(tree, "", dir, path, flags)?)
}

/// Makes a mount read-only, and the mounts below it where `recursive`.
///
/// # Errors
/// As mount_setattr(2).
pub fn set_read_only(mount: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
    mount_setattr(mount, flags, &READ_ONLY)
}

/// Makes a mount writable again, but not the mounts below it.
///
/// # Errors
/// As mount_setattr(2).
pub fn set_writable(mount: BorrowedFd<'_>) -> io::Result<()> {
    let writable = MountAttr {
        attr_clr: libc::MOUNT_ATTR_RDONLY,
        ..MountAttr::default()
    };
    mount_setattr(mount, 0, &writable)
}

/// Whether a mount is read-only.
///
/// # Errors
/// As fstatvfs(3).
pub fn is_read_only(mount: BorrowedFd<'_>) -> io::Result<bool> {
    let flags = rustix::fs::fstatvfs(mount)?.f_flag;
    Ok(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Takes a mount away, with everything mounted below it. It is really gone when
/// nobody uses a file in it any more; `mount` is a use.
///
/// # Errors
/// As umount2(2).
pub fn detach(mount: BorrowedFd<'_>) -> io::Result<()> {
    let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
    Ok(nix::mount::umount2(
        path.as_str(),
        nix::mount::MntFlags::MNT_DETACH,
    )?)
}

/// Cuts a cloned tree off from later mounts of the original.
///
/// # Errors
/// As mount_setattr(2).
pub fn set_private(mount: BorrowedFd<'_>) -> io::Result<()> {
    let private = MountAttr {
        propagation: libc::MS_PRIVATE,
        ..MountAttr::default()
    };
    mount_setattr(mount, libc::AT_RECURSIVE, &private)
}

/// For mount_setattr(2).
pub static READ_ONLY: MountAttr = MountAttr {
    attr_set: libc::MOUNT_ATTR_RDONLY,
    attr_clr: 0,
    propagation: 0,
    userns_fd: 0,
};

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Debug, Default)]
pub struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

fn mount_setattr(mount: BorrowedFd<'_>, flags: libc::c_int, attr: &MountAttr) -> io::Result<()> {
    // SAFETY: the path is a NUL-terminated string and the structure lives and
    // has the announced size for the duration of the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Opens `path` (O_PATH) as a process with `root` as its root directory would:
/// absolute symbolic links and `..` stay inside.
///
/// # Errors
/// As openat2(2) with `RESOLVE_IN_ROOT`.
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    Ok(openat2(
        root,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )?)
}

/// Opens the directory or file `name` in `dir` (O_PATH): no link is
/// followed, and nothing outside `dir` is reached.
///
/// # Errors
/// `ELOOP` for a link, else as openat2(2).
pub fn open_entry(dir: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    Ok(openat2(
        dir,
        name,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )?)
}

/// Whether `fd` is a directory.
///
/// # Errors
/// As fstat(2).
pub fn is_dir(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let stat = rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH)?;
    Ok(rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir())
}
