//! The container's filesystem before libcontainer mounts it: where its root is
//! found, the working directory, devices outside of `/dev`, and tmpfs mounts that
//! start with a copy.
//!
//! What is mounted here is mounted in a mount namespace of this process, so it
//! goes with the container.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use kuasar_runv_protocol::words::words;
use libcontainer::rootfs::utils::{default_devices, to_sflag};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, mknodat};
use oci_spec::runtime::{LinuxDevice, Mount, Spec};
use pathrs::Root;

use super::Failure;
use super::spec::{TMPCOPYUP, is_bind, options};

const NEW_DIR_MODE: u32 = 0o755;
/// Where a container's root is mounted, relative to its private directory.
const ROOTFS: &str = "rootfs";

/// Mounts the container's root in its private directory. The path below the
/// shared directory is looked up anew each time it is used, which costs a request
/// to the host for each of its directories, and libcontainer uses it dozens of
/// times.
pub fn stage(spec: &mut Spec, dir: &Path) -> Result<(), Failure> {
    private_mounts().map_err(Failure::io("making a mount namespace"))?;
    let Some(root) = spec.root_mut() else {
        return Ok(());
    };
    let staged = dir.join(ROOTFS);
    let none = None::<&str>;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    fs::create_dir(&staged)
        .and_then(|()| Ok(mount(Some(root.path()), &staged, none, flags, none)?))
        .map_err(Failure::io("mounting the rootfs"))?;
    root.set_path(staged);
    Ok(())
}

/// Makes `process.cwd`, as root and with runc's mode. When it lies in a
/// filesystem that does not exist yet it is returned, and the process starts in
/// `/`.
pub fn make_cwd(spec: &mut Spec) -> Result<Option<PathBuf>, Failure> {
    let (Some(process), Some(root)) = (spec.process(), spec.root()) else {
        return Ok(None);
    };
    let cwd = clean(process.cwd());
    if cwd == Path::new("/") {
        return Ok(None);
    }
    let covering = spec
        .mounts()
        .iter()
        .flatten()
        .rev()
        .find_map(|m| Some((m, cwd.strip_prefix(clean(m.destination())).ok()?)));
    let (base, path) = match covering {
        None => (root.path().clone(), cwd.as_path()),
        // Made as the mount's own destination.
        Some((_, rest)) if rest.as_os_str().is_empty() => return Ok(None),
        Some((m, rest)) if is_bind(m) => (m.source().clone().unwrap_or_default(), rest),
        Some(_) => {
            let late = cwd.clone();
            if let Some(process) = spec.process_mut() {
                process.set_cwd(PathBuf::from("/"));
            }
            return Ok(Some(late));
        }
    };
    make_dirs(&base, path).map_err(|e| {
        Failure::Other(format!(
            "unable to start container process: error during container init: mkdir {}: {}",
            cwd.display(),
            words(&e)
        ))
    })?;
    Ok(None)
}

fn make_dirs(base: &Path, path: &Path) -> io::Result<()> {
    let root = Root::open(base).map_err(io_error)?;
    match root.resolve(path) {
        Ok(found) => match fs::File::from(OwnedFd::from(found)).metadata()?.is_dir() {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
        },
        Err(_) => root
            .mkdir_all(path, &Permissions::from_mode(NEW_DIR_MODE))
            .map(drop)
            .map_err(io_error),
    }
}

fn io_error(error: pathrs::error::Error) -> io::Error {
    match error.kind() {
        pathrs::error::ErrorKind::OsError(Some(errno)) => io::Error::from_raw_os_error(errno),
        _ => io::Error::other(error),
    }
}

/// Lexically absolute, without `.` and `..`.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

/// Makes the devices that do not lie in `/dev`, which libcontainer refuses. Those in
/// a file system that does not exist yet stay in the spec.
pub fn make_outer_devices(spec: &mut Spec) -> Result<(), Failure> {
    let Some(root) = spec.root().as_ref().map(|r| r.path().clone()) else {
        return Ok(());
    };
    let mounts: Vec<PathBuf> = spec
        .mounts()
        .iter()
        .flatten()
        .map(|m| clean(m.destination()))
        .collect();
    let Some(devices) = spec
        .linux_mut()
        .as_mut()
        .and_then(|l| l.devices_mut().as_mut())
    else {
        return Ok(());
    };
    let mut outer = Vec::new();
    devices.retain(|device| {
        let path = clean(device.path());
        let stays = path.starts_with("/dev") || mounts.iter().any(|m| path.starts_with(m));
        if !stays {
            outer.push((path, device.clone()));
        }
        stays
    });
    for (path, device) in outer {
        make_device(&root, &path, &device)
            .map_err(Failure::io(format!("making the device {}", path.display())))?;
    }
    Ok(())
}

fn make_device(root: &Path, path: &Path, device: &LinuxDevice) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let root = Root::open(root).map_err(io_error)?;
    let parent = path.parent().unwrap_or(Path::new("/"));
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mode = Permissions::from_mode(NEW_DIR_MODE);
    let dir = OwnedFd::from(root.mkdir_all(parent, &mode).map_err(io_error)?);
    let mode = device.file_mode().unwrap_or(0o666) & 0o7777;
    let number =
        nix::sys::stat::makedev(device.major().unsigned_abs(), device.minor().unsigned_abs());
    let kind = to_sflag(device.typ());
    let permissions = Mode::from_bits_truncate(mode);
    match mknodat(Some(dir.as_raw_fd()), name, kind, permissions, number) {
        // As runc: what an earlier container left there is used.
        Err(nix::Error::EEXIST) => return Ok(()),
        made => made?,
    }
    // The directory may be the image's, but the name in it is new.
    let node = root.resolve_nofollow(path).map_err(io_error)?;
    let node = OwnedFd::from(node);
    let at = PathBuf::from(format!("/proc/self/fd/{}", node.as_raw_fd()));
    std::os::unix::fs::chown(&at, device.uid(), device.gid())?;
    fs::set_permissions(&at, Permissions::from_mode(mode))
}

/// Takes away what libcontainer is about to make in a `/dev` that is part of the
/// rootfs, and that an earlier container left there: it insists on making it.
pub fn clear_dev(spec: &Spec) -> Result<(), Failure> {
    const LINKS: &[&str] = &["fd", "stdin", "stdout", "stderr", "kcore"];
    let mut mounts = spec.mounts().iter().flatten();
    let Some(root) = spec.root().as_ref() else {
        return Ok(());
    };
    if mounts.any(|m| clean(m.destination()) == Path::new("/dev")) {
        return Ok(());
    }
    let linux = spec.linux().as_ref();
    let given = linux
        .and_then(|l| l.devices().as_deref())
        .unwrap_or_default();
    let devices = default_devices();
    let paths = LINKS
        .iter()
        .map(|name| Path::new("/dev").join(name))
        .chain(given.iter().chain(&devices).map(|d| d.path().clone()));
    let root = Root::open(root.path())
        .map_err(io_error)
        .map_err(Failure::io("opening the rootfs"))?;
    for path in paths {
        let Ok(found) = root.resolve_nofollow(&path) else {
            continue;
        };
        let kind = fs::File::from(OwnedFd::from(found))
            .metadata()
            .map_err(Failure::io("reading /dev of the rootfs"))?
            .file_type();
        // Anything else is not ours to remove, and reported by libcontainer.
        if kind.is_symlink() || kind.is_char_device() || kind.is_block_device() {
            root.remove_file(&path)
                .map_err(io_error)
                .map_err(Failure::io("clearing /dev of the rootfs"))?;
        }
    }
    Ok(())
}

/// Replaces each tmpfs that is to start with a copy of what it covers by a bind
/// mount of one that was made and filled here.
pub fn copy_up(spec: &mut Spec, dir: &Path) -> Result<(), Failure> {
    let Some(root) = spec.root().as_ref().map(|r| r.path().clone()) else {
        return Ok(());
    };
    for (i, m) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        if !options(m).iter().any(|o| o == TMPCOPYUP) {
            continue;
        }
        let context = format!("copying up {}", m.destination().display());
        copy_up_one(m, &root, &dir.join(format!("tmpfs-{i}"))).map_err(Failure::io(context))?;
    }
    Ok(())
}

fn private_mounts() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    Ok(mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)?)
}

fn copy_up_one(m: &mut Mount, root: &Path, staging: &Path) -> io::Result<()> {
    // Flags are libcontainer's to apply, to the bind mount; data is the
    // filesystem's.
    let (flags, data): (Vec<String>, Vec<String>) = options(m)
        .iter()
        .filter(|o| *o != TMPCOPYUP)
        .cloned()
        .partition(|o| {
            o.parse::<libcontainer::syscall::linux::MountOption>()
                .is_ok()
        });
    fs::create_dir(staging)?;
    mount(
        Some("tmpfs"),
        staging,
        Some("tmpfs"),
        MsFlags::empty(),
        Some(data.join(",").as_str()),
    )?;
    let covered = Root::open(root)
        .and_then(|r| r.resolve(m.destination()))
        .and_then(|h| h.reopen(pathrs::flags::OpenFlags::O_DIRECTORY));
    if let Ok(covered) = covered {
        use std::os::fd::AsRawFd;
        let from = PathBuf::from(format!("/proc/self/fd/{}", covered.as_raw_fd()));
        copy_tree(&from, staging)?;
    }
    m.set_typ(Some("bind".to_owned()));
    m.set_source(Some(staging.to_owned()));
    m.set_options(Some(flags.into_iter().chain(["bind".to_owned()]).collect()));
    Ok(())
}

/// Copies the entries of a directory with owner and mode. Sockets and devices
/// are left out, as they would not work in the copy.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, copy) = (entry.path(), to.join(entry.file_name()));
        let metadata = entry.metadata()?;
        let kind = metadata.file_type();
        if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &copy)?;
        } else if kind.is_dir() {
            fs::create_dir(&copy)?;
            copy_tree(&source, &copy)?;
        } else if kind.is_file() {
            fs::copy(&source, &copy)?;
        } else {
            continue;
        }
        lchown(&copy, Some(metadata.uid()), Some(metadata.gid()))?;
        if !kind.is_symlink() {
            fs::set_permissions(&copy, metadata.permissions())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_as_in_a_jail() {
        assert_eq!(clean(Path::new("/a/./b/../c/")), Path::new("/a/c"));
        assert_eq!(clean(Path::new("../../x")), Path::new("/x"));
    }
}
