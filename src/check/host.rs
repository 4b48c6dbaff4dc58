//! The host: its kernel, its cgroups, where state goes, and how much there is left.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, StatVfsMountFlags, access, statvfs};

use super::{Finding, Subject};

/// mount_setattr(2); everything else that is needed is older.
const OLDEST_KERNEL: (u32, u32) = (5, 12);
/// What the logs and sockets of a few pods need, in bytes.
const LITTLE_SPACE: u64 = 16 << 20;

pub(super) fn user(_: &Subject) -> Finding {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return Finding::ok("user", "root");
    }
    Finding::fail(
        "user",
        format!("user id {}", uid.as_raw()),
        "run it as root: it makes mounts and cgroups",
    )
}

pub(super) fn kernel(_: &Subject) -> Finding {
    let (major, minor) = OLDEST_KERNEL;
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    match version(&release) {
        Some(version) if version < OLDEST_KERNEL => Finding::fail(
            "kernel",
            format!("Linux {release}"),
            format!("Linux {major}.{minor} or newer is needed (mount_setattr)"),
        ),
        _ => Finding::ok("kernel", format!("Linux {release}")),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next()?.parse().ok();
    Some((next()?, next()?))
}

pub(super) fn state_root(subject: &Subject) -> Finding {
    const NAME: &str = "state root";
    let root = subject.root.path();
    let existing = existing(root);
    let writable = statvfs(existing)
        .map(|fs| !fs.f_flag.contains(StatVfsMountFlags::RDONLY))
        .and_then(|writable| {
            access(existing, Access::WRITE_OK | Access::EXEC_OK)?;
            Ok(writable)
        });
    match writable {
        Ok(true) if existing == root => Finding::ok(NAME, root.display().to_string()),
        Ok(true) => Finding::ok(NAME, format!("{} (will be made)", root.display())),
        Ok(false) => Finding::fail(
            NAME,
            format!("{} is on a read-only file system", root.display()),
            "choose another directory with --root",
        ),
        Err(e) => Finding::fail(
            NAME,
            format!(
                "{} cannot be written: {}",
                existing.display(),
                io::Error::from(e)
            ),
            "choose another directory with --root",
        ),
    }
}

/// The path, or the nearest directory above that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors()
        .find(|p| p.is_dir())
        .unwrap_or(Path::new("/"))
}

pub(super) fn cgroups(_: &Subject) -> Finding {
    const NAME: &str = "cgroups";
    match Cgroups::of_host() {
        Cgroups::None => Finding::fail(
            NAME,
            "no cgroup file system is mounted on /sys/fs/cgroup",
            "mount one: mount -t cgroup2 none /sys/fs/cgroup",
        ),
        Cgroups::Found {
            version,
            controllers,
        } => {
            let text = format!("version {version}, controllers: {}", controllers.join(" "));
            let missing: Vec<_> = ["cpu", "memory"]
                .into_iter()
                .filter(|wanted| !controllers.iter().any(|c| c == wanted))
                .collect();
            if missing.is_empty() {
                return Finding::ok(NAME, text);
            }
            let remedy = format!(
                "without the controllers {} engines see no usage and set no limits on the host",
                missing.join(", ")
            );
            Finding::warn(NAME, text, remedy)
        }
    }
}

/// How the host's cgroups are mounted.
pub(super) enum Cgroups {
    None,
    Found {
        /// `1`, `2`, or `1 and 2` where both are in use.
        version: &'static str,
        controllers: Vec<String>,
    },
}

impl Cgroups {
    pub(super) fn of_host() -> Cgroups {
        Cgroups::at(Path::new("/sys/fs/cgroup"))
    }

    fn at(dir: &Path) -> Cgroups {
        let listed = |path: PathBuf| {
            let text = fs::read_to_string(path.join("cgroup.controllers")).ok()?;
            Some(text.split_whitespace().map(str::to_owned).collect())
        };
        if let Some(controllers) = listed(dir.to_owned()) {
            let version = "2";
            return Cgroups::Found {
                version,
                controllers,
            };
        }
        let unified: Option<Vec<String>> = listed(dir.join("unified"));
        let mut controllers: Vec<String> = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.path().join("tasks").exists())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| !name.contains(','))
            .collect();
        let version = match (&unified, controllers.is_empty()) {
            (None, true) => return Cgroups::None,
            (None, false) => "1",
            (Some(_), true) => "2",
            (Some(_), false) => "1 and 2",
        };
        controllers.extend(unified.into_iter().flatten());
        controllers.sort();
        controllers.dedup();
        Cgroups::Found {
            version,
            controllers,
        }
    }
}

pub(super) fn vsock(_: &Subject) -> Finding {
    Finding::ok("vsock", "served in user space, needs no kernel module")
}

pub(super) fn vhost(_: &Subject) -> Finding {
    let modules: Vec<_> = ["vhost-net", "vhost-vsock"]
        .into_iter()
        .filter(|name| Path::new("/dev").join(name).exists())
        .collect();
    let text = match modules.as_slice() {
        [] => "no kernel module, and none needed: devices are served in user space".into(),
        found => format!(
            "{} (not needed: devices are served in user space)",
            found.join(", ")
        ),
    };
    Finding::ok("vhost", text)
}

pub(super) fn tap(_: &Subject) -> Finding {
    const DEVICE: &str = "/dev/net/tun";
    const REMEDY: &str = "containers have no network but loopback without it: modprobe tun, or pass the device into this container";
    match access(DEVICE, Access::READ_OK | Access::WRITE_OK) {
        Ok(()) => Finding::ok("tap", DEVICE),
        Err(rustix::io::Errno::NOENT) => {
            Finding::warn("tap", format!("there is no {DEVICE}"), REMEDY)
        }
        Err(e) => {
            let text = format!("{DEVICE} cannot be used: {}", io::Error::from(e));
            Finding::warn("tap", text, REMEDY)
        }
    }
}

pub(super) fn memory(subject: &Subject) -> Finding {
    const NAME: &str = "memory";
    let wanted = u64::from(subject.config.vm.memory_mib);
    match available_mib() {
        Ok(free) if free < wanted => Finding::warn(
            NAME,
            format!("{free} MiB available, less than one virtual machine may use ({wanted} MiB)"),
            "free some memory, or lower vm.memory_mib in config.toml",
        ),
        Ok(free) => Finding::ok(NAME, format!("{free} MiB available")),
        Err(e) => Finding::warn(
            NAME,
            format!("cannot read /proc/meminfo: {e}"),
            "mount /proc",
        ),
    }
}

/// `MemAvailable` of /proc/meminfo, in MiB.
pub(super) fn available_mib() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib / 1024)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

pub(super) fn disk(subject: &Subject) -> Finding {
    const NAME: &str = "disk";
    let dir = existing(subject.root.path());
    match statvfs(dir) {
        Ok(fs) => {
            let free = fs.f_bavail.saturating_mul(fs.f_frsize);
            let text = format!("{} MiB free for state in {}", free >> 20, dir.display());
            if free < LITTLE_SPACE {
                return Finding::warn(NAME, text, "make room, or choose another --root");
            }
            Finding::ok(NAME, text)
        }
        Err(e) => {
            let text = format!("{}: {}", dir.display(), io::Error::from(e));
            Finding::warn(NAME, text, "choose another directory with --root")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;
    use crate::config::Config;
    use crate::root::Root;

    #[test]
    fn both_versions_of_cgroups_are_recognised() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Cgroups::at(dir.path()), Cgroups::None));
        for controller in ["cpu", "memory", "cpu,cpuacct"] {
            fs::create_dir(dir.path().join(controller)).unwrap();
            fs::write(dir.path().join(controller).join("tasks"), "").unwrap();
        }
        let Cgroups::Found {
            version,
            controllers,
        } = Cgroups::at(dir.path())
        else {
            panic!("version 1 is not seen");
        };
        assert_eq!(
            (version, controllers.join(" ").as_str()),
            ("1", "cpu memory")
        );
        fs::write(dir.path().join("cgroup.controllers"), "cpu io\n").unwrap();
        assert!(matches!(
            Cgroups::at(dir.path()),
            Cgroups::Found { version: "2", .. }
        ));
    }

    #[test]
    fn a_root_below_a_file_or_a_read_only_place_is_a_failure() {
        let ask = |path: &str| {
            state_root(&Subject {
                root: Root::new(Some(path.into())),
                config: Config::default(),
            })
        };
        assert_eq!(ask("/run/kuasar-runv-missing/deeper").level, Level::Ok);
        assert_eq!(ask("/proc/sys/missing").level, Level::Fail);
    }

    #[test]
    fn releases_are_compared_by_number() {
        assert_eq!(version("6.1.0-56-amd64"), Some((6, 1)));
        assert!(version("5.4.0").unwrap() < OLDEST_KERNEL);
        assert_eq!(version("six"), None);
    }
}
