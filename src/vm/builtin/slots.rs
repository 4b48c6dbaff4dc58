//! Slots for devices that come and go.
//!
//! Every slot has an address and an interrupt line from boot on, and reads as empty
//! until a device is in it. A guest finds devices there when its agent has the kernel
//! look again (`guest/src/mmio.rs`), which takes no hot-plug controller and no driver
//! for one.
//!
//! A device whose driver has let go of it leaves at once. Otherwise it loses what is
//! behind it at once, says that it needs a reset, and keeps its slot until the driver
//! has let go: a guest that never does has one slot less.

use std::collections::BTreeMap;
use std::sync::Arc;

use std::time::Duration;
use vm_memory::{GuestMemory, GuestMemoryRegion};

use super::BuiltinVm;
use super::acpi;
use super::devices::plugged::{BackEnd, Plugged};
use super::devices::{block, net, vhost_user};
use super::layout::{BOOT_SLOTS, VIRTIO_SLOTS};
use super::machine::unwire;
use super::setup::Machine;
use super::virtio::rings::Events;
use crate::vm::devices::vhost_user::Handle;
use crate::vm::{Device, Error, Place, valid_device_id};

/// How many devices there can be at the same time.
const SLOTS: usize = VIRTIO_SLOTS - BOOT_SLOTS;

/// What is in the slots.
#[derive(Default)]
pub struct Slots {
    /// By number of the slot.
    taken: BTreeMap<usize, Taken>,
    /// Used last. The next one is another, see the module.
    last: usize,
}

struct Taken {
    /// `None` when it has been detached, and its driver still has it.
    id: Option<String>,
    events: Arc<Events>,
    handles: Vec<Handle>,
    back_end: Arc<dyn BackEnd>,
}

impl Slots {
    /// Puts a device into a free slot. A back end has until `deadline` to say what it is.
    /// The device's handles, which tell when it fails, are to be
    /// watched.
    ///
    /// # Errors
    /// See [`crate::vm::Vm::attach`].
    pub fn attach(
        &mut self,
        machine: &Machine,
        vcpus: u32,
        id: &str,
        device: &Device,
        deadline: Duration,
    ) -> Result<(Place, &[Handle]), Error> {
        let is_known = |taken: &Taken| taken.id.as_deref() == Some(id);
        if !valid_device_id(id) || self.taken.values().any(is_known) {
            return Err(Error::DeviceId(id.to_owned()));
        }
        self.collect(machine);
        let slot = self.free().ok_or(Error::NoSlot { slots: SLOTS })?;
        let plugged = match device {
            Device::Net(device) => net::plug(&machine.memory, device),
            Device::Block(device) => block::plug(&machine.memory, vcpus, id, device),
            // Its program maps the file of the memory, of which a template's has none.
            Device::VhostUser(_) if machine.memory.iter().any(|r| r.file_offset().is_none()) => {
                return Err(BuiltinVm::unsupported(
                    "devices of other programs in a machine of a template: set enabled in section [template] to false",
                ));
            }
            Device::VhostUser(device) => {
                vhost_user::plug(&machine.memory, vcpus, id, device, deadline)
            }
            Device::Vfio { .. } => return Err(no_vfio()),
        };
        let Plugged {
            planned,
            handles,
            back_end,
        } = plugged.map_err(|source| Error::Io {
            context: "cannot make the device",
            source,
        })?;
        let events = planned.events;
        let wired =
            machine
                .board
                .insert(&machine.vm, slot, planned.identity, planned.rings, &events);
        wired.map_err(|e| Error::Kvm {
            operation: "wiring a device",
            source: std::io::Error::from_raw_os_error(e.errno()),
        })?;
        self.last = slot;
        let taken = Taken {
            id: Some(id.to_owned()),
            events,
            handles,
            back_end,
        };
        Ok((
            place(slot),
            &self.taken.entry(slot).or_insert(taken).handles,
        ))
    }

    fn free(&self) -> Option<usize> {
        let first = BOOT_SLOTS.max(self.last + 1);
        let mut slots = (first..VIRTIO_SLOTS).chain(BOOT_SLOTS..first);
        slots.find(|slot| !self.taken.contains_key(slot))
    }

    /// Takes a device from the guest.
    ///
    /// # Errors
    /// There is none of this id.
    pub fn detach(&mut self, machine: &Machine, id: &str) -> Result<(), Error> {
        let found = self
            .taken
            .iter_mut()
            .find(|(_, taken)| taken.id.as_deref() == Some(id));
        let Some((&slot, taken)) = found else {
            return Err(Error::DeviceId(id.to_owned()));
        };
        taken.id = None;
        taken.back_end.disconnect();
        machine.board.retire(slot);
        self.collect(machine);
        Ok(())
    }

    /// Cleans up the slots of detached devices that are gone.
    fn collect(&mut self, machine: &Machine) {
        self.taken.retain(|&slot, taken| {
            let gone = taken.id.is_none() && machine.board.is_free(slot);
            if gone {
                unwire(&machine.vm, slot, &taken.events);
            }
            !gone
        });
    }

    /// Why a device that is attached does not work any more.
    pub fn failure(&self) -> Option<String> {
        let attached = |taken: &&Taken| taken.id.is_some();
        self.taken.values().filter(attached).find_map(|taken| {
            let id = taken.id.as_deref().unwrap_or_default();
            let reason = taken.handles.iter().find_map(Handle::failure)?;
            Some(format!("the device {id} has failed: {reason}"))
        })
    }
}

/// The name that Linux gives to a device of the platform bus: the id in the tables, and
/// the how manieth of this id it is.
fn place(slot: usize) -> Place {
    Place(format!("{}:{slot:02x}", acpi::VIRTIO_ID))
}

/// Nothing of it is written: the whole memory of the guest would have to be pinned.
fn no_vfio() -> Error {
    BuiltinVm::unsupported(
        "physical devices in the virtual machine; set hypervisor = \"qemu\", which does",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_needs_a_physical_device_is_told_who_has_them() {
        let message = no_vfio().to_string();
        assert_eq!(
            message,
            "the hypervisor builtin does not support physical devices in the virtual machine; set \
             hypervisor = \"qemu\", which does"
        );
    }

    #[test]
    fn places_are_named_as_linux_names_them() {
        assert_eq!(place(11).0, "LNRO0005:0b");
    }
}
