//! Devices of other programs: the connection becomes a character device of QEMU, which
//! is the front end.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::hotplug::{FrontEnd, backend, close, net_card, remove};
use super::qmp::Qmp;
use super::relay::Relay;
use crate::vm::{Error, VhostUserDevice, VhostUserKind};

/// Command that removes a back end.
pub(super) const REMOVE: &str = "chardev-remove";
pub(super) const REMOVE_NET: &str = "netdev_del";

/// Hands the connection over. `directory` is the sandbox's.
pub(super) fn add(
    qmp: &mut Qmp,
    id: &str,
    device: &VhostUserDevice,
    directory: &Path,
    deadline: Duration,
) -> Result<FrontEnd, Error> {
    if let VhostUserKind::Net { .. } = device.kind {
        return add_net(qmp, id, device, directory, deadline);
    }
    let name = format!("vhost-user-{id}");
    qmp.pass_fd(&name, device.socket.as_fd(), deadline)?;
    let chardev = chardev(id, &json!({ "type": "fd", "data": { "str": name } }));
    if let Err(e) = qmp.execute("chardev-add", Some(chardev), deadline) {
        close(qmp, &[name], deadline);
        return Err(e.into());
    }
    Ok(FrontEnd {
        arguments: front_end(id, &device.kind),
        remove_backend: vec![REMOVE],
    })
}

/// A card: QEMU connects by itself, to a [`Relay`].
fn add_net(
    qmp: &mut Qmp,
    id: &str,
    device: &VhostUserDevice,
    directory: &Path,
    deadline: Duration,
) -> Result<FrontEnd, Error> {
    let relayed = |source| Error::Io {
        context: "cannot connect QEMU to the program of a card",
        source,
    };
    let name = format!("{id}-vhost.sock");
    let relay = Relay::new(directory, &name, &device.socket).map_err(relayed)?;
    // Its working directory is the sandbox's.
    let chardev = chardev(id, &json!({ "type": "unix", "data": { "path": name } }));
    qmp.execute("chardev-add", Some(chardev), deadline)?;
    let netdev = json!({ "type": "vhost-user", "id": backend(id), "chardev": backend(id) });
    let running = relay.run().map_err(relayed);
    let added = running.and_then(|()| {
        let added = qmp.execute("netdev_add", Some(netdev), deadline);
        added.map(drop).map_err(Error::from)
    });
    if let Err(e) = added {
        remove(qmp, REMOVE, id, deadline);
        return Err(e);
    }
    let mut arguments = front_end(id, &device.kind);
    if !has_kvm(qmp, deadline) {
        // Without KVM, QEMU (7.2) ends by SIGSEGV when a driver takes such a card into use that
        // has message signalled interrupts: it looks for KVM's routes of them
        // (`virtio_pci_one_vector_unmask`). So the card has a line.
        arguments["vectors"] = json!(0);
    }
    Ok(FrontEnd {
        arguments,
        // What uses the connection goes before it.
        remove_backend: vec![REMOVE_NET, REMOVE],
    })
}

/// A connection to what is at this address.
fn chardev(id: &str, address: &Value) -> Value {
    json!({
        "id": backend(id),
        "backend": { "type": "socket", "data": { "addr": address, "server": false } },
    })
}

/// Whether the machine runs with KVM, and not emulated.
fn has_kvm(qmp: &mut Qmp, deadline: Duration) -> bool {
    qmp.execute("query-kvm", None, deadline)
        .is_ok_and(|answer| answer["enabled"] == true)
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
        VhostUserKind::Net { mac } => net_card(id, *mac),
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
        let mac = [2, 0, 0, 0, 0xab, 1];
        let net = front_end("net1", &VhostUserKind::Net { mac });
        assert_eq!(net["driver"], "virtio-net-pci");
        assert_eq!(net["netdev"], "back-net1");
        assert_eq!(net["mac"], "02:00:00:00:ab:01");
    }
}
