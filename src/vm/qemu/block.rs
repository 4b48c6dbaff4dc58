//! Disks: a block device or an image file behind a virtio-blk device.
//!
//! QEMU sees a read-only host, so it gets the file as a descriptor: a set with one
//! descriptor has a name that it can open (`/dev/fdset/N`).

use std::os::fd::AsFd;
use std::time::Duration;

use serde_json::{Value, json};

use super::hotplug::{FrontEnd, backend};
use super::qmp::{Qmp, QmpError};
use crate::vm::{BlockDevice, Error};

/// Command that removes a back end.
pub(super) const REMOVE: &str = "blockdev-del";

/// Makes the back end of a disk.
pub(super) fn add(
    qmp: &mut Qmp,
    id: &str,
    disk: &BlockDevice,
    deadline: Duration,
) -> Result<FrontEnd, Error> {
    let set = qmp.add_fd(disk.file.as_fd(), deadline)?;
    let made = qmp.execute("blockdev-add", Some(back_end(id, set, disk)), deadline);
    // The back end has its own copy.
    let removed = qmp.execute("remove-fd", Some(json!({ "fdset-id": set })), deadline);
    if let Err(e @ QmpError::Refused { .. }) = removed {
        log::warn!("closing the descriptor of {id}: {e}");
    }
    made?;
    Ok(FrontEnd {
        arguments: json!({
            "driver": "virtio-blk-pci",
            "drive": backend(id),
            "serial": id,
            // As for network devices.
            "disable-legacy": "on",
        }),
        remove_backend: vec![REMOVE],
    })
}

fn back_end(id: &str, set: u64, disk: &BlockDevice) -> Value {
    json!({
        "driver": if disk.is_device { "host_device" } else { "file" },
        "node-name": backend(id),
        "filename": format!("/dev/fdset/{set}"),
        "read-only": disk.read_only,
        "auto-read-only": false,
        // A device is read by others of the host as well; the guest has a cache of
        // its own. Not every file system has direct I/O for an image.
        "cache": { "direct": disk.is_device, "no-flush": false },
        "discard": "unmap",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_cached_by_the_host_and_a_device_is_not() {
        for (is_device, driver) in [(true, "host_device"), (false, "file")] {
            let disk = BlockDevice {
                file: std::fs::File::open("/dev/null").unwrap().into(),
                is_device,
                read_only: !is_device,
            };
            let made = back_end("disk-1", 7, &disk);
            assert_eq!(made["driver"], driver);
            assert_eq!(made["filename"], "/dev/fdset/7");
            assert_eq!(made["cache"]["direct"], is_device);
            assert_eq!(made["read-only"], !is_device);
        }
    }
}
