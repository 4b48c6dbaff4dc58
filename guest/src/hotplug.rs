//! Devices that come and go. The guest has no driver for hot-plug: the host says
//! when there is something new, and the kernel is told to look.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::{mmio, pci};

const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";

/// Places of devices whose requests may never end: a program of the host serves them,
/// and when it is gone, a driver that is to let go of such a device waits for ever.
static KEPT: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// From now on only [`remove_at`] has a driver let go of what is in this place.
pub fn keep(place: &str) {
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    kept.insert(place.to_owned());
}

/// Whether a device of the kernel's tree is in a place of [`keep`].
#[must_use]
pub fn is_kept(device: &Path) -> bool {
    let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    kept.iter().any(|place| is_at(device, place))
}

/// The virtio device in a place, as the host names it (`Disk` of
/// protocol/proto/storage.proto), if the kernel has found it.
///
/// # Errors
/// As readdir(3).
pub fn device_at(place: &str) -> io::Result<Option<PathBuf>> {
    let devices = match fs::read_dir(VIRTIO_DEVICES) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    for device in devices {
        // One that goes meanwhile is not the one.
        if let Ok(path) = fs::canonicalize(device?.path())
            && is_at(&path, place)
        {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Whether a path of the kernel's tree leads through a place. The bridge for devices
/// that come and go is on the first bus, they are not.
fn is_at(device: &Path, place: &str) -> bool {
    let mut names = device.iter().filter_map(|name| name.to_str());
    match place.strip_prefix("pci:") {
        Some(slot) => {
            let end = format!(":{slot}.0");
            names.any(|name| name.ends_with(&end) && !name.starts_with("0000:00:"))
        }
        None => names.any(|name| name == place),
    }
}

/// Has the driver let go of what is in a place of [`keep`], if there is something.
///
/// # Errors
/// As write(2).
pub fn remove_at(place: &str) -> io::Result<()> {
    if let Some(device) = device_at(place)? {
        remove_device(device)?;
    }
    release(place);
    Ok(())
}

/// The end of [`keep`]: its driver lets go of the device like any other.
pub fn release(place: &str) {
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    kept.remove(place);
}

/// Has the kernel look for new devices, and forget those that are gone.
///
/// # Errors
/// When sysfs is not mounted.
pub fn rescan() -> io::Result<()> {
    pci::rescan()?;
    mmio::rescan()
}

/// Lets go of the device that a device of a class belongs to, such as
/// `/sys/class/net/eth0`. One that is gone already is no error.
///
/// # Errors
/// As write(2).
pub fn remove(class_device: &Path) -> io::Result<()> {
    match fs::canonicalize(class_device.join("device")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => remove_device(other?),
    }
}

fn remove_device(mut device: PathBuf) -> io::Result<()> {
    // From the virtio device up to that of its transport.
    loop {
        if mmio::is_place(&device) {
            return mmio::release(&device);
        }
        if device.join("remove").exists() {
            return pci::forget(&device);
        }
        if !device.pop() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_known_by_their_places() {
        let platform = Path::new("/sys/devices/platform/LNRO0005:0b/virtio5");
        assert!(is_at(platform, "LNRO0005:0b"));
        assert!(!is_at(platform, "LNRO0005:0c") && !is_at(platform, "pci:0b"));
        let pci = Path::new("/sys/devices/pci0000:00/0000:00:1e.0/0000:01:05.0/virtio3");
        assert!(is_at(pci, "pci:05"));
        assert!(!is_at(pci, "pci:1e") && !is_at(pci, "pci:15") && !is_at(pci, "5"));
    }

    #[test]
    fn kept_places_are_those_that_were_named() {
        keep("LNRO0005:7e");
        assert!(is_kept(Path::new("/sys/devices/platform/LNRO0005:7e")));
        assert!(!is_kept(Path::new("/sys/devices/platform/LNRO0005:7d")));
        remove_at("LNRO0005:7e").unwrap();
        assert!(!is_kept(Path::new("/sys/devices/platform/LNRO0005:7e")));
    }
}
