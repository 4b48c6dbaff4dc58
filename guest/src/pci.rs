//! Devices that come and go. The guest has no driver for hot-plug: the host says
//! when there is something new, and the kernel is told to look
//! (Documentation/ABI/testing/sysfs-bus-pci).

use std::fs;
use std::io;
use std::path::Path;

const DEVICES: &str = "/sys/bus/pci/devices";

/// Has the kernel look for devices behind bridges, where all that are plugged in
/// are.
///
/// # Errors
/// When sysfs is not mounted.
pub fn rescan() -> io::Result<()> {
    for device in fs::read_dir(DEVICES)? {
        let rescan = device?.path().join("rescan");
        // Only bridges have one that finds anything: their buses begin below them.
        if rescan.with_file_name("pci_bus").exists() {
            fs::write(rescan, "1")?;
        }
    }
    Ok(())
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
    match fs::write(device.join("remove"), "1") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
