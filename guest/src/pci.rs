//! PCI devices that come and go: the kernel is told to look for them
//! (Documentation/ABI/testing/sysfs-bus-pci).

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use crate::hotplug;

const DEVICES: &str = "/sys/bus/pci/devices";

/// Has the kernel look for devices behind bridges, where all that are plugged in
/// are. Those that are gone without having been let go of are forgotten first: their
/// slots may be in use again.
///
/// # Errors
/// As read(2) and write(2) of sysfs.
pub fn rescan() -> io::Result<()> {
    let mut bridges = Vec::new();
    let devices = match fs::read_dir(DEVICES) {
        Ok(devices) => devices,
        // A machine without PCI.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for device in devices {
        let path = device?.path();
        if path.join("pci_bus").exists() {
            bridges.push(path);
        } else if is_gone(&path) && !is_kept(&path)? {
            forget(&path)?;
        }
    }
    for bridge in bridges {
        fs::write(bridge.join("rescan"), "1")?;
    }
    Ok(())
}

/// Whether nobody answers for a device any more: all ones are read where its ids are
/// (PCI Local Bus Specification 3.0, 6.1).
fn is_gone(device: &Path) -> bool {
    let mut ids = [0; 4];
    let read = fs::File::open(device.join("config")).and_then(|mut f| f.read_exact(&mut ids));
    read.is_ok() && ids == [0xff; 4]
}

/// The links of the bus's directory do not show where a device is.
fn is_kept(device: &Path) -> io::Result<bool> {
    Ok(hotplug::is_kept(&fs::canonicalize(device)?))
}

/// Has the kernel let go of a device.
///
/// # Errors
/// As write(2).
pub fn forget(device: &Path) -> io::Result<()> {
    match fs::write(device.join("remove"), "1") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
