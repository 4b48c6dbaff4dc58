//! Devices that come and go. The guest has no driver for hot-plug: the host says
//! when there is something new, and the kernel is told to look.

use std::fs;
use std::io;
use std::path::Path;

use crate::{mmio, pci};

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
    let mut device = match fs::canonicalize(class_device.join("device")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
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
