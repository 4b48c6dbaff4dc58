//! `linux.devices`, and bind mounts of device nodes: which of the host's devices
//! the guest has too, and which have to be attached to it.
//!
//! A device number means nothing in another kernel. Character devices are those of
//! the guest: the standard ones, and a few that a container is given on purpose
//! ([`GUEST_HAS`]). Block devices of the host become disks of the virtual machine.
//! Loop devices that are free on the host are the guest's own.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use serde_json::Value;

use super::guest_spec::Error;
use super::guest_volumes::disk::{self, Disk};
use super::guest_volumes::{GuestVolume, Kind, Place};

/// Character devices of the guest: major number, minor number (`None`: all).
/// Documentation/admin-guide/devices.txt of Linux.
const GUEST_HAS: &[(u32, Option<u32>)] = &[
    (1, None),       // null, zero, full, random, urandom, kmsg
    (5, None),       // tty, console, ptmx
    (10, Some(200)), // net/tun
    (10, Some(229)), // fuse
    (10, Some(237)), // loop-control
    (136, None),     // pts
];
const KVM: (u32, u32) = (10, 232);
const LOOP: u32 = 7;
const SYSFS: &str = "/sys/dev";

/// What becomes of a device.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// The guest has it under the same number, or nobody has.
    Guests,
    Disk(PathBuf),
    Refused(&'static str),
}

/// The disks among `linux.devices`; takes those that are left out from the guest's
/// config.json.
///
/// # Errors
/// [`Error::Unsupported`] for a device that cannot be in a virtual machine.
pub fn translate(spec: &Spec, config: &mut Value) -> Result<Vec<GuestVolume>, Error> {
    let Some(linux) = spec.linux() else {
        return Ok(Vec::new());
    };
    let given = linux.devices().as_deref().unwrap_or_default();
    let rules = linux.resources().as_ref();
    let rules = rules.and_then(|r| r.devices().as_deref());
    let is_privileged = rules.unwrap_or_default().iter().any(allows_everything);
    let mut kept = Vec::new();
    let mut volumes = Vec::new();
    for (index, device) in given.iter().enumerate() {
        // An engine lists all devices of the host for a privileged container.
        let is_listed = is_privileged && is_the_hosts(device);
        match fate(device)? {
            Fate::Guests => {}
            _ if is_listed => {
                log::debug!("{} stays on the host", device.path().display());
                continue;
            }
            Fate::Refused(why) => return Err(refused(device.path(), why)),
            Fate::Disk(source) => {
                let metadata = fs::metadata(&source).map_err(|e| at(device.path(), e))?;
                volumes.push(GuestVolume {
                    place: Place::Device(kept.len()),
                    kind: Kind::Disk(Disk::device(source, &metadata, is_read_only(device, rules))),
                });
            }
        }
        kept.push(config["linux"]["devices"][index].clone());
    }
    if !given.is_empty() {
        config["linux"]["devices"] = Value::Array(kept);
    }
    Ok(volumes)
}

/// The disk that a bind mount of a device node is; `None` for what the guest has.
///
/// # Errors
/// As [`translate`].
pub fn of_bind(source: &Path, read_only: bool) -> Result<Option<Disk>, Error> {
    let Ok(metadata) = fs::metadata(source) else {
        return Ok(None);
    };
    let kind = metadata.file_type();
    let number = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    if kind.is_char_device() {
        return match char_device(number) {
            Fate::Refused(why) => Err(refused(source, why)),
            _ => Ok(None),
        };
    }
    if !kind.is_block_device() || is_free_loop(number) {
        return Ok(None);
    }
    Ok(Some(Disk::device(source.to_owned(), &metadata, read_only)))
}

fn fate(device: &LinuxDevice) -> Result<Fate, Error> {
    let number = |n: i64| u32::try_from(n).unwrap_or(u32::MAX);
    let number = (number(device.major()), number(device.minor()));
    match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => Ok(char_device(number)),
        LinuxDeviceType::B => block_device(number).map_err(|e| at(device.path(), e)),
        _ => Ok(Fate::Guests),
    }
}

fn char_device(number: (u32, u32)) -> Fate {
    let (major, minor) = number;
    let has = |known: &&(u32, Option<u32>)| known.0 == major && known.1.is_none_or(|m| m == minor);
    if GUEST_HAS.iter().any(|known| has(&known)) {
        return Fate::Guests;
    }
    if number == KVM {
        return Fate::Refused("there is no KVM in a virtual machine of this runtime");
    }
    // What the host does not have either cannot be used, but made, as with runc.
    let Ok(sysfs) = fs::canonicalize(Path::new(SYSFS).join(format!("char/{major}:{minor}"))) else {
        return Fate::Guests;
    };
    if is_vfio(&sysfs) {
        return Fate::Refused(
            "groups of VFIO are not passed on to the virtual machine; \
             a network card is when it is in the container's network namespace",
        );
    }
    Fate::Refused("it is a device of the host, which the virtual machine does not have")
}

/// A group, the container of groups, or a device of VFIO, by its place in sysfs.
fn is_vfio(sysfs: &Path) -> bool {
    sysfs.components().any(|part| {
        ["vfio", "vfio-dev"]
            .iter()
            .any(|name| part.as_os_str() == *name)
    })
}

fn block_device(number: (u32, u32)) -> io::Result<Fate> {
    let sysfs = sysfs_of(number);
    if !sysfs.exists() || is_free_loop(number) {
        return Ok(Fate::Guests);
    }
    let uevent = fs::read_to_string(sysfs.join("uevent"))?;
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="));
    let node = Path::new("/dev").join(name.ok_or(io::ErrorKind::NotFound)?);
    let rdev = fs::metadata(&node)?.rdev();
    if (libc::major(rdev), libc::minor(rdev)) != number {
        return Err(io::Error::other(format!(
            "{} is another device",
            node.display()
        )));
    }
    Ok(Fate::Disk(node))
}

fn sysfs_of((major, minor): (u32, u32)) -> PathBuf {
    Path::new(SYSFS).join(format!("block/{major}:{minor}"))
}

fn is_free_loop(number: (u32, u32)) -> bool {
    number.0 == LOOP && disk::is_empty(&sysfs_of(number)).unwrap_or(true)
}

/// Whether the container's path is that of the same device on the host.
fn is_the_hosts(device: &LinuxDevice) -> bool {
    fs::metadata(device.path()).is_ok_and(|found| {
        let rdev = found.rdev();
        i64::from(libc::major(rdev)) == device.major()
            && i64::from(libc::minor(rdev)) == device.minor()
    })
}

fn allows_everything(rule: &LinuxDeviceCgroup) -> bool {
    let wildcard = |number: Option<i64>| number.is_none_or(|n| n < 0);
    let access = rule.access().as_deref().unwrap_or_default();
    rule.allow()
        && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
        && wildcard(rule.major())
        && wildcard(rule.minor())
        && ['r', 'w'].iter().all(|needed| access.contains(*needed))
}

/// Whether no rule lets the container write to a block device.
fn is_read_only(device: &LinuxDevice, rules: Option<&[LinuxDeviceCgroup]>) -> bool {
    let is = |number: Option<i64>, own: i64| number.is_none_or(|n| n < 0 || n == own);
    let about = |rule: &&LinuxDeviceCgroup| {
        let of_type = matches!(
            rule.typ(),
            None | Some(LinuxDeviceType::A | LinuxDeviceType::B)
        );
        of_type && is(rule.major(), device.major()) && is(rule.minor(), device.minor())
    };
    let writes = |rule: &&LinuxDeviceCgroup| {
        let access = rule.access().as_deref().unwrap_or_default();
        access.is_empty() || access.contains('w')
    };
    // The last rule about writing decides; without one everything is allowed.
    let last = rules.into_iter().flatten().rev().filter(about).find(writes);
    last.is_some_and(|rule| !rule.allow())
}

fn refused(path: &Path, why: &str) -> Error {
    Error::Unsupported(format!(
        "the device {} is not supported: {why}",
        path.display()
    ))
}

fn at(path: &Path, source: io::Error) -> Error {
    Error::Volume {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn translated(devices: Value, rules: Value) -> Result<(Vec<GuestVolume>, Value), Error> {
        let mut config = json!({
            "ociVersion": "1.0.2",
            "linux": {"devices": devices, "resources": {"devices": rules}},
        });
        let spec = serde_json::from_value(config.clone()).unwrap();
        let volumes = translate(&spec, &mut config)?;
        Ok((volumes, config["linux"]["devices"].take()))
    }

    #[test]
    fn what_the_guest_has_stays() {
        let devices = json!([
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
            {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200},
            {"path": "/dev/none", "type": "c", "major": 4000, "minor": 1},
            {"path": "/dev/disk", "type": "b", "major": 4000, "minor": 1},
            {"path": "/dev/fifo", "type": "p"},
        ]);
        let (volumes, kept) = translated(devices.clone(), json!([])).unwrap();
        assert!(volumes.is_empty());
        assert_eq!(kept, devices);
    }

    #[test]
    fn what_only_the_host_has_is_refused_or_left_out_when_everything_is_listed() {
        let kvm = json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]);
        let message = translated(kvm.clone(), json!([])).unwrap_err().to_string();
        assert!(
            message.contains("/dev/kvm") && message.contains("no KVM"),
            "{message}"
        );
        // Every Linux has this one, and no virtual machine of ours.
        let Some((path, major, minor)) = some_char_device() else {
            return;
        };
        let listed = json!([{"path": path, "type": "c", "major": major, "minor": minor}]);
        let message = translated(listed.clone(), json!([]))
            .unwrap_err()
            .to_string();
        assert!(message.contains(&path), "{message}");
        let everything = json!([{"allow": true, "access": "rwm"}]);
        let (volumes, kept) = translated(listed, everything).unwrap();
        assert!(volumes.is_empty() && kept == json!([]), "{kept}");
    }

    #[test]
    fn groups_of_vfio_are_told_by_their_place() {
        for (path, expected) in [
            ("/sys/devices/virtual/vfio/12", true),
            ("/sys/devices/virtual/misc/vfio", true),
            ("/sys/devices/pci0000:00/0000:00:04.0/vfio-dev/vfio0", true),
            ("/sys/devices/virtual/mem/kmsg", false),
            ("/sys/devices/virtual/misc/vfio-like", false),
        ] {
            assert_eq!(is_vfio(Path::new(path)), expected, "{path}");
        }
    }

    /// A device of this host that is none of the guest's.
    fn some_char_device() -> Option<(String, u32, u32)> {
        let entries = fs::read_dir("/dev").ok()?;
        entries.flatten().find_map(|entry| {
            let metadata = entry.metadata().ok()?;
            let number = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
            let is_it = metadata.file_type().is_char_device()
                && number != KVM
                && matches!(char_device(number), Fate::Refused(_));
            is_it.then(|| (entry.path().display().to_string(), number.0, number.1))
        })
    }

    #[test]
    fn a_disk_nobody_may_write_to_is_read_only() {
        let device = json!({"path": "/dev/x", "type": "b", "major": 8, "minor": 1});
        let device: LinuxDevice = serde_json::from_value(device).unwrap();
        let rule = |allow: bool, access: &str| json!({"allow": allow, "type": "b", "major": 8, "minor": 1, "access": access});
        let deny = json!({"allow": false, "access": "rwm"});
        for (rules, expected) in [
            (json!([]), false),
            (json!([deny]), true),
            (json!([deny, rule(true, "rw")]), false),
            (json!([deny, rule(true, "rm")]), true),
            (json!([deny, rule(true, "rwm"), rule(false, "w")]), true),
        ] {
            let given: Vec<LinuxDeviceCgroup> = serde_json::from_value(rules.clone()).unwrap();
            assert_eq!(is_read_only(&device, Some(&given)), expected, "{rules}");
        }
    }
}
