//! Virtio devices that come and go in places that are always there.
//!
//! The built-in VMM's firmware tables name places for devices, most of them empty.
//! The driver of the platform bus leaves an empty place alone when it looks at it, and
//! looks again when it is told to (Documentation/driver-api/driver-model/binding.rst).

use std::fs;
use std::io;
use std::path::Path;

use crate::hotplug;

const DEVICES: &str = "/sys/bus/platform/devices";
const PROBE: &str = "/sys/bus/platform/drivers_probe";
/// The id of a place by ACPI.
const ACPI_ID: &str = "LNRO0005:";
/// Bit of a device's status (VIRTIO 1.2, 2.1): the host has taken it away.
const NEEDS_RESET: u32 = 64;

/// Has the kernel look for devices in all places. Those that are gone without having
/// been let go of are forgotten first.
///
/// # Errors
/// When sysfs is not mounted.
pub fn rescan() -> io::Result<()> {
    for device in fs::read_dir(DEVICES)? {
        let device = device?;
        let name = device.file_name();
        if !name.as_encoded_bytes().starts_with(ACPI_ID.as_bytes()) {
            continue;
        }
        let place = device.path();
        if is_gone(&place)? && !hotplug::is_kept(&place) {
            release(&place)?;
        }
        if !place.join("driver").exists() {
            // Nobody wants an empty place.
            match fs::write(PROBE, name.as_encoded_bytes()) {
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::EINVAL)) => {}
                other => other?,
            }
        }
    }
    Ok(())
}

/// Whether what is in a place does not work any more, usually because the host has
/// taken it away.
///
/// # Errors
/// As readdir(3).
pub fn is_gone(place: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(place)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().starts_with(b"virtio") {
            continue;
        }
        let status = fs::read_to_string(entry.path().join("status"));
        if status.is_ok_and(|status| needs_reset(&status)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What the kernel shows of a device's status: `0x0000004f`.
fn needs_reset(status: &str) -> bool {
    let digits = status.trim().strip_prefix("0x");
    digits
        .and_then(|digits| u32::from_str_radix(digits, 16).ok())
        .is_some_and(|status| status & NEEDS_RESET != 0)
}

/// Whether a device of the kernel's tree is such a place.
#[must_use]
pub fn is_place(device: &Path) -> bool {
    let name = device.file_name().unwrap_or_default();
    name.as_encoded_bytes().starts_with(ACPI_ID.as_bytes())
}

/// Has the driver let go of what is in a place.
///
/// # Errors
/// As write(2).
pub fn release(place: &Path) -> io::Result<()> {
    let name = place.file_name().unwrap_or_default();
    match fs::write(place.join("driver/unbind"), name.as_encoded_bytes()) {
        // No driver has it any more.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_are_gone_say_so_in_their_status() {
        assert!(needs_reset("0x0000004f\n"));
        for status in ["0x0000000f\n", "0x00000000", "", "0x", "64", "0xzz"] {
            assert!(!needs_reset(status), "{status:?}");
        }
    }

    #[test]
    fn places_are_told_from_other_devices() {
        assert!(is_place(Path::new("/sys/devices/platform/LNRO0005:07")));
        assert!(!is_place(Path::new("/sys/devices/pci0000:00/0000:00:03.0")));
        assert!(!is_place(Path::new("/")));
    }
}
