//! Devices that come and go while the machine runs.
//!
//! The root bus of q35 takes none, so the machine has a PCI bridge with [`SLOTS`]
//! slots for them. Its hot-plug controller (SHPC) is there for QEMU's sake: the
//! guest has no driver for it, and none for hot-plug by ACPI either, whose tables
//! cost 4 % of the boot under emulation. The agent has the guest's kernel look
//! for new devices and let go of old ones instead, which is at once and on demand;
//! and since the controller never hears of a slot that is in use, QEMU removes a
//! device without asking the guest.
//!
//! A device is two objects of QEMU: a back end named `back-<id>`, and a front end
//! named `<id>` in a slot.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError};
use super::vhost_user::REMOVE_NET;
use super::{NAME, block, vhost_user};
use crate::vm::{Device, Error, MAX_DEVICES, NetDevice, Place, VmEvent, valid_device_id};

/// Id of the bridge.
pub(super) const BUS: &str = "hotplug";
/// Slots for devices, from 1 on: a bridge has 31 besides that of its controller
/// (PCI-to-PCI Bridge Architecture 1.2, 13.2.1), and the last one is taken.
pub(super) const SLOTS: usize = MAX_DEVICES;
/// Slot of the device that is there from boot. The guest's kernel gives the bridge
/// windows of 1 MiB for it, the smallest there are, and everything else that is
/// plugged in fits into what is left; without it there would be no window.
pub(super) const BOOT_SLOT: &str = "1f";

/// What is plugged in, by id.
#[derive(Debug, Default)]
pub(super) struct HotPlug {
    devices: BTreeMap<String, Plugged>,
    /// Used last. The next one is another, so that a guest that has not noticed the
    /// end of a device does not take the next for it.
    last_slot: usize,
}

#[derive(Debug)]
struct Plugged {
    /// 1 to [`SLOTS`].
    slot: usize,
    /// Commands that remove the back end, as long as there is one.
    remove_backend: Vec<&'static str>,
}

/// What `device_add` gets besides id and place, and the commands that remove the
/// back end again, in their order.
pub(super) struct FrontEnd {
    pub(super) arguments: Value,
    pub(super) remove_backend: Vec<&'static str>,
}

impl HotPlug {
    /// See [`crate::vm::Vm::attach`]. `directory` is the sandbox's.
    pub(super) fn attach(
        &mut self,
        qmp: &mut Qmp,
        id: &str,
        device: &Device,
        directory: &Path,
        deadline: Duration,
    ) -> Result<Place, Error> {
        if !valid_device_id(id) || self.devices.contains_key(id) {
            return Err(Error::DeviceId(id.to_owned()));
        }
        let slot = self.free_slot().ok_or(Error::NoSlot { slots: SLOTS })?;
        let mut front = match device {
            Device::Net(net) => add_net(qmp, id, net, deadline)?,
            Device::Vfio { address } => vfio(address),
            Device::Block(disk) => block::add(qmp, id, disk, deadline)?,
            Device::VhostUser(device) => vhost_user::add(qmp, id, device, directory, deadline)?,
        };
        front.arguments["id"] = json!(id);
        front.arguments["bus"] = json!(BUS);
        front.arguments["addr"] = json!(format!("{slot:x}"));
        if let Err(e) = qmp.execute("device_add", Some(front.arguments), deadline) {
            for command in front.remove_backend {
                remove(qmp, command, id, deadline);
            }
            return Err(e.into());
        }
        let plugged = Plugged {
            slot,
            remove_backend: front.remove_backend,
        };
        self.devices.insert(id.to_owned(), plugged);
        self.last_slot = slot;
        Ok(Place(format!("pci:{slot:02x}")))
    }

    fn free_slot(&self) -> Option<usize> {
        let mut slots = (1..=SLOTS).map(|n| (self.last_slot + n - 1) % SLOTS + 1);
        slots.find(|slot| self.devices.values().all(|d| d.slot != *slot))
    }

    /// See [`crate::vm::Vm::detach`].
    pub(super) fn detach(
        &mut self,
        qmp: &mut Qmp,
        id: &str,
        deadline: Duration,
    ) -> Result<(), Error> {
        let Some(device) = self.devices.get_mut(id) else {
            return Err(Error::DeviceId(id.to_owned()));
        };
        qmp.execute("device_del", Some(json!({ "id": id })), deadline)?;
        // The connection to the network ends now, the rest when QEMU gets there.
        if device.remove_backend.first() == Some(&REMOVE_NET) {
            device.remove_backend.remove(0);
            remove(qmp, REMOVE_NET, id, deadline);
        }
        Ok(())
    }

    /// The front end of this id is gone.
    pub(super) fn on_deleted(
        &mut self,
        qmp: &mut Qmp,
        id: &str,
    ) -> Result<Option<VmEvent>, QmpError> {
        let Some(device) = self.devices.remove(id) else {
            return Ok(None);
        };
        for command in device.remove_backend {
            // The answer is of no interest unless it is a refusal, which is logged.
            qmp.send(command, Some(of_backend(command, id)))?;
        }
        Ok(Some(VmEvent::Detached { id: id.to_owned() }))
    }
}

pub(super) fn backend(id: &str) -> String {
    format!("back-{id}")
}

/// Arguments of a command that removes a back end.
fn of_backend(command: &str, id: &str) -> Value {
    match command {
        block::REMOVE => json!({ "node-name": backend(id) }),
        _ => json!({ "id": backend(id) }),
    }
}

/// Removes a back end. What cannot be removed goes with the machine.
pub(super) fn remove(qmp: &mut Qmp, command: &'static str, id: &str, deadline: Duration) {
    if let Err(e) = qmp.execute(command, Some(of_backend(command, id)), deadline) {
        log::warn!("removing the back end of {id}: {e}");
    }
}

/// Makes the back end of a network interface.
fn add_net(
    qmp: &mut Qmp,
    id: &str,
    net: &NetDevice,
    deadline: Duration,
) -> Result<FrontEnd, Error> {
    let queues = pass(qmp, id, "queue", &net.queues, deadline)?;
    let vhost = match pass(qmp, id, "vhost", &net.vhost, deadline) {
        Ok(vhost) => vhost,
        Err(e) => {
            close(qmp, &queues, deadline);
            return Err(e);
        }
    };
    let mut netdev = json!({ "type": "tap", "id": backend(id), "fds": queues.join(":") });
    if !vhost.is_empty() {
        netdev["vhost"] = json!(true);
        netdev["vhostfds"] = json!(vhost.join(":"));
    }
    if let Err(e) = qmp.execute("netdev_add", Some(netdev), deadline) {
        close(qmp, &queues, deadline);
        close(qmp, &vhost, deadline);
        return Err(e.into());
    }
    let mut arguments = net_card(id, net.mac);
    arguments["mq"] = json!(net.queues.len() > 1);
    Ok(FrontEnd {
        arguments,
        remove_backend: vec![REMOVE_NET],
    })
}

/// A card with one pair of queues.
pub(super) fn net_card(id: &str, mac: [u8; 6]) -> Value {
    let [a, b, c, d, e, f] = mac;
    json!({
        "driver": "virtio-net-pci",
        "netdev": backend(id),
        "mac": format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"),
        // The bridge is a conventional one, where the default is to speak the
        // protocol from before virtio 1.0 as well.
        "disable-legacy": "on",
        "romfile": "",
    })
}

fn vfio(address: &str) -> FrontEnd {
    FrontEnd {
        arguments: json!({ "driver": "vfio-pci", "host": address, "rombar": 0 }),
        remove_backend: Vec::new(),
    }
}

/// Passes descriptors; returns the names QEMU knows them by.
fn pass(
    qmp: &mut Qmp,
    id: &str,
    kind: &str,
    fds: &[OwnedFd],
    deadline: Duration,
) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for (index, fd) in fds.iter().enumerate() {
        let name = format!("{kind}-{id}-{index}");
        if let Err(e) = qmp.pass_fd(&name, fd.as_fd(), deadline) {
            close(qmp, &names, deadline);
            return Err(e.into());
        }
        names.push(name);
    }
    Ok(names)
}

/// Has QEMU close descriptors that no command has taken.
pub(super) fn close(qmp: &mut Qmp, names: &[String], deadline: Duration) {
    for name in names {
        // A command that failed half-way has taken some of them.
        if let Err(e) = qmp.execute("closefd", Some(json!({ "fdname": name })), deadline) {
            log::debug!("{NAME}: closing {name}: {e}");
        }
    }
}
