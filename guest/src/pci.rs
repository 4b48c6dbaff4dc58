//! Devices that come and go. The guest has no driver for hot-plug: the host says
//! when there is something new, and the kernel is told to look
//! (Documentation/ABI/testing/sysfs-bus-pci).

use std::fs;
use std::io::{self, Read};
use std::path::Path;

const DEVICES: &str = "/sys/bus/pci/devices";

/// Has the kernel look for devices behind bridges, where all that are plugged in
/// are. Those that are gone without having been let go of are forgotten first: their
/// slots may be in use again.
///
/// # Errors
/// When sysfs is not mounted.
pub fn rescan() -> io::Result<()> {
    let mut bridges = Vec::new();
    for device in fs::read_dir(DEVICES)? {
        let path = device?.path();
        if path.join("pci_bus").exists() {
            bridges.push(path);
        } else if is_gone(&path) {
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

fn forget(device: &Path) -> io::Result<()> {
    match fs::write(device.join("remove"), "1") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Lets go of the PCI device that a device of a class belongs to, such as
/// `/sys/class/net/eth0`. One that is gone already is no error.
///
/// # Errors
/// As write(2).
pub fn remove(class_device: &Path) -> io::Result<()> {
    let mut device = match fs::canonicalize(class_device.join("device")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    // From the virtio device up to that of its transport.
    while !device.join("remove").exists() {
        if !device.pop() {
            return Ok(());
        }
    }
    forget(&device)
}
