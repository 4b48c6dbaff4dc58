//! The board: what processors see of the rest of the machine.

use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::layout::{VIRTIO_LINES, VIRTIO_SIZE, VIRTIO_SLOTS, VIRTIO_START, virtio_address};
use super::ports::{Ports, Request, SavedSerial};
use super::virtio::page::Pages;
use super::virtio::registers::{
    INTERRUPT_ACK, INTERRUPT_QUEUE, Identity, QUEUE_NOTIFY, Registers, Rings,
};
use super::virtio::rings::Events;
use super::virtio::saved::{SavedDevice, Unfit};
use crate::vm::devices::vhost_user::lock;

/// I/O ports and slots of virtio devices, shared by the threads of all processors.
pub struct Board {
    ports: Mutex<Ports>,
    slots: Vec<Mutex<Registers>>,
    pages: Pages,
}

impl Board {
    /// # Errors
    /// As mmap(2).
    pub fn new(ports: Ports) -> std::io::Result<Board> {
        let pages = Pages::new(VIRTIO_SLOTS)?;
        let slots = (0..VIRTIO_SLOTS).filter_map(|slot| pages.page(slot));
        Ok(Board {
            ports: Mutex::new(ports),
            slots: slots.map(|page| Mutex::new(Registers::new(page))).collect(),
            pages,
        })
    }

    /// Has the guest read the registers of the slots as memory, `region` of KVM's
    /// numbers of such. The board has to outlive the running machine.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn show(&self, vm: &VmFd, region: u32) -> Result<(), kvm_ioctls::Error> {
        let (userspace_addr, memory_size) = self.pages.place();
        let description = kvm_userspace_memory_region {
            slot: region,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: VIRTIO_START,
            memory_size,
            userspace_addr,
        };
        // SAFETY: the range is mapped as long as the board lives, and this process expects
        // changes of nobody else there, which the guest cannot make.
        unsafe { vm.set_user_memory_region(description) }
    }

    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        lock(&self.ports).read(port, data);
    }

    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<Request> {
        lock(&self.ports).write(port, data)
    }

    /// See [`Ports::serial_accesses`].
    pub fn serial_accesses(&self) -> u64 {
        lock(&self.ports).serial_accesses()
    }

    /// Reads where there is no memory, or across its end. Where there is nothing, all bits
    /// are set.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.slot(address) {
            Some((registers, offset)) => lock(registers).read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((registers, offset)) = self.slot(address) {
            lock(registers).write(offset, data);
        }
    }

    fn slot(&self, address: u64) -> Option<(&Mutex<Registers>, u64)> {
        let offset = address.checked_sub(VIRTIO_START)?;
        let slot = usize::try_from(offset / VIRTIO_SIZE).ok()?;
        Some((self.slots.get(slot)?, offset % VIRTIO_SIZE))
    }

    /// Puts a device into a slot and wires it: kicks of the guest become events
    /// without an exit to this process, events of the device interrupts.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn insert(
        &self,
        vm: &VmFd,
        slot: usize,
        identity: Identity,
        rings: Box<dyn Rings>,
        events: &Arc<Events>,
    ) -> Result<(), kvm_ioctls::Error> {
        if let Err(e) = wire(vm, slot, events) {
            unwire(vm, slot, events);
            return Err(e);
        }
        lock(&self.slots[slot]).insert(identity, rings);
        Ok(())
    }

    /// What the drivers have set up; the devices have stopped. Slots are filled
    /// from the first on.
    ///
    /// # Errors
    /// A device that cannot be saved.
    pub fn save(&self) -> Result<(SavedSerial, Vec<SavedDevice>), Unfit> {
        let mut devices = Vec::new();
        for slot in &self.slots {
            match lock(slot).save()? {
                Some(device) => devices.push(device),
                None => break,
            }
        }
        Ok((lock(&self.ports).save(), devices))
    }

    /// Has the device of a slot, which was just put there, go on where a saved one was.
    /// Its driver is interrupted: interrupts that were on their way are not saved, and one
    /// too many does no harm.
    ///
    /// # Errors
    /// See [`Unfit`].
    pub fn go_on(&self, slot: usize, saved: &SavedDevice, events: &Events) -> Result<(), Unfit> {
        lock(&self.slots[slot]).restore(saved)?;
        // Fails only when the counter is full, that is, when it is set already.
        let _ = events.call.write(1);
        Ok(())
    }

    /// Puts a device into a slot that nobody is wired to.
    #[cfg(any(test, fuzzing))]
    pub fn insert_unwired(&self, slot: usize, identity: Identity, rings: Box<dyn Rings>) {
        lock(&self.slots[slot]).insert(identity, rings);
    }

    /// The device of a slot lost what is behind it, and goes as soon as its driver has
    /// given it up.
    pub fn retire(&self, slot: usize) {
        lock(&self.slots[slot]).retire();
    }

    pub fn is_free(&self, slot: usize) -> bool {
        lock(&self.slots[slot]).is_empty()
    }
}

/// What the guest writes to a slot that is an event for somebody: where, what, whose.
fn writes(slot: usize, events: &Events) -> impl Iterator<Item = (IoEventAddress, u32, &EventFd)> {
    let at = move |register| IoEventAddress::Mmio(virtio_address(slot) + register);
    let kicks = events.kicks.iter().zip(0..);
    kicks
        .map(move |(kick, number)| (at(QUEUE_NOTIFY), number, kick))
        .chain([(at(INTERRUPT_ACK), INTERRUPT_QUEUE, &events.seen)])
}

fn wire(vm: &VmFd, slot: usize, events: &Events) -> Result<(), kvm_ioctls::Error> {
    for (address, value, event) in writes(slot, events) {
        vm.register_ioevent(event, &address, value)?;
    }
    vm.register_irqfd(&events.call, VIRTIO_LINES[slot])
}

/// Takes the wires of a slot away, in which nothing is any more.
pub fn unwire(vm: &VmFd, slot: usize, events: &Events) {
    for (address, value, event) in writes(slot, events) {
        if let Err(e) = vm.unregister_ioevent(event, &address, value) {
            log::debug!("virtio slot {slot}: {address:?}, {value}: {e}");
        }
    }
    if let Err(e) = vm.unregister_irqfd(&events.call, VIRTIO_LINES[slot]) {
        log::debug!("virtio slot {slot}: interrupt: {e}");
    }
}
