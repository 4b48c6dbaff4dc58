//! A machine of a template: what the template says, and devices that are as new.

use std::os::fd::OwnedFd;

use kvm_ioctls::Kvm;
use vmm_sys_util::eventfd::EventFd;

use super::store::Template;
use super::{Error, chips, processor};
use crate::vm;
use crate::vm::builtin::devices::Planned;
use crate::vm::builtin::memory::MemoryFile;
use crate::vm::builtin::ports::{Ports, SavedSerial};
use crate::vm::builtin::setup::{self, Kvms, Machine};
use crate::vm::builtin::virtio::saved::SavedDevice;

/// A machine without devices. Nothing of it runs.
pub struct Restored {
    /// For the devices.
    pub memory: MemoryFile,
    kvms: Kvms,
    /// Most processors.
    places: u8,
    serial: SavedSerial,
    devices: Vec<SavedDevice>,
}

impl Restored {
    /// Gives KVM everything that it had.
    ///
    /// # Errors
    /// It does not take something.
    pub fn new(template: Template) -> Result<Restored, Error> {
        let Template { state, memory } = template;
        let kvm = Kvm::new().map_err(Error::kvm("opening /dev/kvm"))?;
        let vm = setup::create_vm(&kvm).map_err(|(operation, e)| Error::kvm(operation)(e))?;
        let mapped = memory
            .map()
            .map_err(|e| Error::Misfit(format!("its memory cannot be mapped: {e}")))?;
        let regions =
            setup::add_memory(&vm, &mapped, memory.size()).map_err(Error::kvm("adding memory"))?;
        // All of them before the first gets its state: they have one clock.
        let vcpus = (0..state.processors.len() as u64)
            .map(|number| vm.create_vcpu(number))
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::kvm("making a virtual CPU"))?;
        if let (Some(first), Some(saved)) = (vcpus.first(), state.processors.first()) {
            processor::forget_time(first, saved)?;
        }
        for (vcpu, saved) in vcpus.iter().zip(&state.processors) {
            processor::restore(vcpu, saved)?;
        }
        chips::restore(&vm, &state.chips)?;
        for vcpu in &vcpus {
            // It fails when the guest does not use the clock.
            let _ = vcpu.kvmclock_ctrl();
        }
        Ok(Restored {
            memory,
            kvms: Kvms {
                kvm,
                vm,
                vcpus,
                memory: mapped,
                regions,
            },
            // At most MAX_VCPUS.
            places: state.made_for.most.vcpus as u8,
            serial: state.serial,
            devices: state.devices,
        })
    }

    /// Puts the devices into their slots and lets the machine go on.
    ///
    /// # Errors
    /// KVM or the host refuse something, or a device is another one.
    pub fn start(
        self,
        devices: Vec<Planned>,
        console: Option<OwnedFd>,
        reported: EventFd,
    ) -> Result<Machine, vm::Error> {
        let vm = &self.kvms.vm;
        let make = |line, console| Ports::restore(&self.serial, line, console);
        let ports = setup::serial(vm, console, make)?;
        let board = setup::board(ports.map_err(|source| vm::Error::Io {
            context: "cannot make the console",
            source,
        })?)?;
        let misfit = |what: String| vm::Error::Template(Error::Misfit(what));
        if devices.len() != self.devices.len() {
            return Err(misfit("it has other devices".into()));
        }
        for (slot, (device, saved)) in devices.into_iter().zip(&self.devices).enumerate() {
            let events = setup::insert(&board, vm, slot, device)?;
            board
                .go_on(slot, saved, &events)
                .map_err(|e| misfit(format!("the device in slot {slot}: {e}")))?;
        }
        self.kvms.start(board, self.places, reported, Vec::new())
    }
}
