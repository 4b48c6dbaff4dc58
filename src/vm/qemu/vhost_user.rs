//! Devices of other programs: the connection becomes a character device of QEMU, which
//! is the front end.

use std::os::fd::AsFd;
use std::time::Duration;

use serde_json::{Value, json};

use super::hotplug::{FrontEnd, backend, close};
use super::qmp::Qmp;
use crate::vm::{Error, VhostUserDevice, VhostUserKind};

/// Command that removes a back end.
pub(super) const REMOVE: &str = "chardev-remove";

/// Hands the connection over.
pub(super) fn add(
    qmp: &mut Qmp,
    id: &str,
    device: &VhostUserDevice,
    deadline: Duration,
) -> Result<FrontEnd, Error> {
    let name = format!("vhost-user-{id}");
    qmp.pass_fd(&name, device.socket.as_fd(), deadline)?;
    let chardev = json!({
        "id": backend(id),
        "backend": { "type": "socket", "data": {
            "addr": { "type": "fd", "data": { "str": name } },
            "server": false,
        } },
    });
    if let Err(e) = qmp.execute("chardev-add", Some(chardev), deadline) {
        close(qmp, &[name], deadline);
        return Err(e.into());
    }
    Ok(FrontEnd {
        arguments: front_end(id, &device.kind),
        remove_backend: Some(REMOVE),
    })
}

fn front_end(id: &str, kind: &VhostUserKind) -> Value {
    match kind {
        // More queues than the back end has would be an error.
        VhostUserKind::Block => json!({
            "driver": "vhost-user-blk-pci",
            "chardev": backend(id),
            "num-queues": 1,
        }),
        VhostUserKind::Fs { tag } => json!({
            "driver": "vhost-user-fs-pci",
            "chardev": backend(id),
            "tag": tag,
            "queue-size": 512,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_front_end() {
        let block = front_end("disk-1", &VhostUserKind::Block);
        assert_eq!(block["driver"], "vhost-user-blk-pci");
        assert_eq!(block["chardev"], "back-disk-1");
        let tag = "fs-1".to_owned();
        let fs = front_end("fs-1", &VhostUserKind::Fs { tag });
        assert_eq!(fs["driver"], "vhost-user-fs-pci");
        assert_eq!(fs["tag"], "fs-1");
    }
}
