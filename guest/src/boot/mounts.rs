//! The agent's own root and the filesystems in it.

use std::fs;
use std::io;
use std::path::Path;

use kuasar_runv_protocol::{GUEST_SHARE_DIR, GUEST_SHM_DIR, SHARE_TAG};
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use super::BootError;
use super::cmdline::{self, Config};
use crate::cgroup;

/// Where the new root is put together, in the initial rootfs.
const STAGING: &str = "/kuasar-root";
/// Where the image is visible when the debug console needs a shell from it.
pub const IMAGE_DIR: &str = "/run/kuasar/image";

const SAFE: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

struct Filesystem {
    typ: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const FILESYSTEMS: &[Filesystem] = &[
    fs("sysfs", "/sys", SAFE, ""),
    fs("proc", "/proc", SAFE, ""),
    fs("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755"),
    fs(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID,
        "newinstance,ptmxmode=0666,mode=0620,gid=5",
    ),
    fs("tmpfs", "/dev/shm", SAFE, "mode=1777"),
];

/// Directories of the new root that are nobody's mount point. The root is a
/// tmpfs already, so /run and /tmp need none of their own. The root user of a
/// user namespace has to get through those above a container's files.
const DIRECTORIES: &[(&str, u32)] = &[
    ("/run", 0o755),
    ("/run/kuasar", 0o711),
    (GUEST_SHARE_DIR, 0o755),
    (GUEST_SHM_DIR, 0o711),
    (crate::containers::STATE_DIR, 0o711),
    ("/tmp", 0o1777),
];

const fn fs(
    typ: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
) -> Filesystem {
    Filesystem {
        typ,
        target,
        flags,
        data,
    }
}

/// Puts a tmpfs with the kernel's filesystems together and makes it the root.
pub fn move_to_own_root() -> Result<Config, BootError> {
    let staging = Path::new(STAGING);
    make_dir(staging, 0o755).map_err(BootError::io("making the new root"))?;
    mount_one("tmpfs", "tmpfs", staging, MsFlags::MS_NOSUID, "mode=0755")?;
    for filesystem in FILESYSTEMS {
        let target = staging.join(filesystem.target.trim_start_matches('/'));
        make_dir(&target, 0o755).map_err(BootError::io("making mount points"))?;
        mount_one(
            filesystem.typ,
            filesystem.typ,
            &target,
            filesystem.flags,
            filesystem.data,
        )?;
        if filesystem.typ == "sysfs" {
            expedite_grace_periods(&target);
        }
    }
    mount_cgroups(&staging.join(cgroup::MOUNT_POINT.trim_start_matches('/')))?;
    for (dir, mode) in DIRECTORIES {
        make_dir(&staging.join(dir.trim_start_matches('/')), *mode)
            .map_err(BootError::io("making directories"))?;
    }
    let config = cmdline::read(&staging.join("proc/cmdline"))
        .map_err(BootError::io("reading the kernel command line"))?;
    if config.debug_console {
        keep_image(&staging.join(IMAGE_DIR.trim_start_matches('/')))?;
    }
    enter(staging).map_err(BootError::io("entering the new root"))?;
    Ok(config)
}

/// Keeps the initial rootfs in sight: the console's shell is in it.
fn keep_image(target: &Path) -> Result<(), BootError> {
    make_dir(target, 0o700).map_err(BootError::io("making directories"))?;
    let none = None::<&str>;
    mount(Some("/"), target, none, MsFlags::MS_BIND, none)
        .map_err(|e| BootError::io("keeping the image")(io::Error::from(e)))
}

/// Making and ending namespaces, cgroups and mounts waits for RCU. The ordinary
/// grace periods spare machines with many processors; this one has few, and
/// containers wait for them.
fn expedite_grace_periods(sysfs: &Path) {
    // Costs only time where the kernel has no such switch.
    drop(fs::write(sysfs.join("kernel/rcu_expedited"), "1"));
}

/// cgroup v2; moving processes without a grace period where the kernel can.
fn mount_cgroups(target: &Path) -> Result<(), BootError> {
    mount_one(
        "cgroup2",
        "cgroup2",
        target,
        SAFE,
        "nsdelegate,favordynmods",
    )
    .or_else(|_| mount_one("cgroup2", "cgroup2", target, SAFE, "nsdelegate"))
}

fn enter(staging: &Path) -> io::Result<()> {
    chdir(staging)?;
    let none = None::<&str>;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

/// Mounts the pod's shared directory.
pub fn mount_share() -> Result<(), BootError> {
    mount_one(
        SHARE_TAG,
        "virtiofs",
        Path::new(GUEST_SHARE_DIR),
        MsFlags::empty(),
        "",
    )
}

fn mount_one(
    source: &str,
    typ: &str,
    target: &Path,
    flags: MsFlags,
    data: &str,
) -> Result<(), BootError> {
    let data = (!data.is_empty()).then_some(data);
    mount(Some(source), target, Some(typ), flags, data).map_err(|e| BootError::Mount {
        target: target.display().to_string(),
        source: e.into(),
    })
}

fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    match fs::create_dir(path) {
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(mode)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
    }
}
