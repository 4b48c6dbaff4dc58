//! A guest's side of one queue, for tests.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

use crate::vm::builtin::memory::MemoryFile;
use crate::vm::builtin::virtio::registers::{QueueSetup, Rings};
use crate::vm::builtin::virtio::rings::{Events, SharedRings};
use crate::vm::builtin::virtio::worker::{ServiceMemory, ServiceRing};

const ENTRIES: u16 = 32;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

pub struct TestRing {
    pub file: MemoryFile,
    pub memory: ServiceMemory<()>,
    pub ring: ServiceRing<()>,
    next_descriptor: u16,
    next_available: u16,
    _rings: SharedRings<ServiceMemory<()>>,
}

impl TestRing {
    /// Size of the guest's memory.
    pub const SIZE: u64 = 1 << 20;

    pub fn new() -> TestRing {
        let file = MemoryFile::new(Self::SIZE).unwrap();
        let memory = GuestMemoryAtomic::new(file.map().unwrap());
        let events = Arc::new(Events::new(1).unwrap());
        let mut rings = SharedRings::new(&memory, &[ENTRIES], events).unwrap();
        let setup = QueueSetup {
            size: ENTRIES,
            ready: true,
            descriptors: DESCRIPTORS,
            available: AVAILABLE,
            used: USED,
        };
        assert!(rings.start(1 << 32, &[setup]));
        TestRing {
            ring: rings.rings()[0].clone(),
            file,
            memory,
            next_descriptor: 0,
            next_available: 0,
            _rings: rings,
        }
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        let memory = self.memory.memory();
        memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let memory = self.memory.memory();
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn descriptor(&mut self, address: u64, len: u32, flags: u32, next: u16) {
        let place = DESCRIPTORS + u64::from(self.next_descriptor) * 16;
        self.write(place, &address.to_le_bytes());
        self.write(place + 8, &len.to_le_bytes());
        self.write(place + 12, &(flags as u16).to_le_bytes());
        self.write(place + 14, &next.to_le_bytes());
        self.next_descriptor += 1;
    }

    fn publish(&mut self, head: u16) {
        let place = AVAILABLE + 4 + u64::from(self.next_available % ENTRIES) * 2;
        self.write(place, &head.to_le_bytes());
        self.next_available += 1;
        self.write(AVAILABLE + 2, &self.next_available.to_le_bytes());
    }

    /// Makes a chain of (address, length, writable by the device) available.
    pub fn add(&mut self, chain: &[(u64, u32, bool)]) {
        let head = self.next_descriptor;
        for (index, (address, len, writable)) in chain.iter().enumerate() {
            let mut flags = u32::from(*writable) * VRING_DESC_F_WRITE;
            if index + 1 < chain.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            self.descriptor(*address, *len, flags, self.next_descriptor + 1);
        }
        self.publish(head);
    }

    /// A chain whose only descriptor is followed by itself.
    pub fn add_loop(&mut self) {
        let head = self.next_descriptor;
        let flags = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE;
        self.descriptor(0x50_000, 16, flags, head);
        self.publish(head);
    }

    /// Lengths of the used buffers, in order.
    pub fn used(&self) -> Vec<u32> {
        let u16_at = |address| u16::from_le_bytes(self.read(address, 2).try_into().unwrap());
        let count = u64::from(u16_at(USED + 2));
        let len = |index| {
            let bytes = self.read(USED + 4 + index * 8 + 4, 4);
            u32::from_le_bytes(bytes.try_into().unwrap())
        };
        (0..count).map(len).collect()
    }
}
