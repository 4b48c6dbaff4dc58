//! Virtio devices in slots that were empty when the machine booted. Nothing tells
//! the guest when one is put in: the host says so, and the driver is told to look
//! again (Documentation/ABI/testing/sysfs-bus-platform, driver-api/driver-model).

use std::fs;
use std::io;
use std::path::Path;

const DEVICES: &str = "/sys/bus/platform/devices";
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// ACPI's id of a slot; the names of slots begin with it.
const SLOT: &str = "LNRO0005:";

/// Has the driver look into the slots where it has found nothing.
///
/// # Errors
/// When sysfs is not mounted.
pub fn rescan() -> io::Result<()> {
    let bind = Path::new(DRIVER).join("bind");
    // A machine without such devices need not have the driver.
    if !bind.exists() {
        return Ok(());
    }
    for device in fs::read_dir(DEVICES)? {
        let device = device?;
        let name = device.file_name();
        let is_slot = name.to_string_lossy().starts_with(SLOT);
        if is_slot && !device.path().join("driver").exists() {
            // It is still empty, or somebody else was faster.
            let _ = fs::write(&bind, name.as_encoded_bytes());
        }
    }
    Ok(())
}

/// Has the driver let go of the slot with this path in sysfs.
///
/// # Errors
/// As write(2).
pub fn remove(slot: &Path) -> io::Result<()> {
    let name = slot.file_name().unwrap_or_default();
    match fs::write(Path::new(DRIVER).join("unbind"), name.as_encoded_bytes()) {
        // Somebody else was faster.
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other,
    }
}

/// Whether a device in sysfs is a slot.
#[must_use]
pub fn is_slot(device: &Path) -> bool {
    let name = device.file_name().unwrap_or_default();
    name.to_string_lossy().starts_with(SLOT)
}
