//! Devices that come and go while the machine runs.
//!
//! Each slot is there from boot, most of them empty. A driver that probed an empty
//! one has left it alone; the agent has it look again after a device was put in, and
//! let go of one before it is taken out (`guest/src/mmio.rs`).

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::devices::{self, Planned};
use super::layout::VIRTIO_LINES;
use super::machine::Board;
use super::memory::MemoryFile;
use super::setup::kvm_error;
use super::virtio::rings::Events;
use super::{NAME, devices::FIXED};
use crate::vm::{Device, Error, Served, valid_device_id};

/// Slots for devices that are plugged in.
const SLOTS: usize = VIRTIO_LINES.len() - FIXED;

/// What is plugged in, by id.
#[derive(Default)]
pub struct HotPlug {
    devices: BTreeMap<String, Plugged>,
}

struct Plugged {
    slot: usize,
    events: Arc<Events>,
    /// Its thread ends with it.
    served: Served,
}

impl HotPlug {
    /// See [`crate::vm::Vm::attach`].
    pub fn attach(
        &mut self,
        vm: &VmFd,
        board: &Board,
        file: &MemoryFile,
        id: &str,
        device: &Device,
    ) -> Result<(), Error> {
        if !valid_device_id(id) || self.devices.contains_key(id) {
            return Err(Error::DeviceId(id.to_owned()));
        }
        let slot = (FIXED..VIRTIO_LINES.len())
            .find(|slot| self.devices.values().all(|device| device.slot != *slot))
            .ok_or(Error::NoSlot { slots: SLOTS })?;
        let (planned, served) = start(file, device)?;
        let events = planned.events.clone();
        let inserted = board.insert(vm, slot, planned.identity, planned.rings, &events);
        if let Err(e) = inserted {
            board.remove(vm, slot, &events);
            return Err(kvm_error("wiring a device")(e));
        }
        let plugged = Plugged {
            slot,
            events,
            served,
        };
        self.devices.insert(id.to_owned(), plugged);
        Ok(())
    }

    /// See [`crate::vm::Vm::detach`].
    pub fn detach(&mut self, vm: &VmFd, board: &Board, id: &str) -> Result<(), Error> {
        let plugged = self.devices.remove(id);
        let plugged = plugged.ok_or_else(|| Error::DeviceId(id.to_owned()))?;
        board.remove(vm, plugged.slot, &plugged.events);
        drop(plugged.served);
        Ok(())
    }
}

fn start(file: &MemoryFile, device: &Device) -> Result<(Planned, Served), Error> {
    let operation = match device {
        Device::Net(net) => {
            let starting = |source| Error::Io {
                context: "cannot start a network interface",
                source,
            };
            // One queue serves it; the others of the tap end with their descriptors.
            let tap = net
                .queues
                .first()
                .ok_or_else(|| starting(std::io::Error::other("there is no queue of a tap")))?;
            let tap = tap.try_clone().map_err(starting)?;
            return devices::network(file, tap, net.mac).map_err(starting);
        }
        Device::Block { .. } => "attaching a block device",
        Device::Vfio { .. } => "passing a physical device through",
    };
    Err(Error::Unsupported {
        hypervisor: NAME,
        operation,
    })
}
