//! A guest's side of queues, for tests.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::vm::builtin::memory::MemoryFile;
use crate::vm::builtin::virtio::registers::{QueueSetup, Rings};
use crate::vm::builtin::virtio::rings::{Events, SharedRings};
use crate::vm::builtin::virtio::worker::{ServiceMemory, ServiceRing};

const ENTRIES: u16 = 32;
// Offsets in a queue's memory.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;

/// A queue as its driver sees it.
pub struct TestQueue {
    memory: GuestMemoryMmap,
    start: u64,
    next_descriptor: u16,
    next_available: u16,
}

impl TestQueue {
    /// A queue at this address, which takes 12 KiB.
    pub fn new(memory: GuestMemoryMmap, start: u64) -> TestQueue {
        TestQueue {
            memory,
            start,
            next_descriptor: 0,
            next_available: 0,
        }
    }

    pub fn setup(&self) -> QueueSetup {
        QueueSetup {
            size: ENTRIES,
            ready: true,
            descriptors: self.start,
            available: self.start + AVAILABLE,
            used: self.start + USED,
        }
    }

    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn descriptor(&mut self, address: u64, len: u32, flags: u32, next: u16) {
        let place = self.start + u64::from(self.next_descriptor) * 16;
        self.write(place, &address.to_le_bytes());
        self.write(place + 8, &len.to_le_bytes());
        self.write(place + 12, &(flags as u16).to_le_bytes());
        self.write(place + 14, &next.to_le_bytes());
        self.next_descriptor = (self.next_descriptor + 1) % ENTRIES;
    }

    fn publish(&mut self, head: u16) {
        let available = self.start + AVAILABLE;
        let place = available + 4 + u64::from(self.next_available % ENTRIES) * 2;
        self.write(place, &head.to_le_bytes());
        self.next_available += 1;
        self.write(available + 2, &self.next_available.to_le_bytes());
    }

    /// Makes a chain of (address, length, writable by the device) available.
    pub fn add(&mut self, chain: &[(u64, u32, bool)]) {
        let head = self.next_descriptor;
        for (index, (address, len, writable)) in chain.iter().enumerate() {
            let mut flags = u32::from(*writable) * VRING_DESC_F_WRITE;
            if index + 1 < chain.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            let next = (self.next_descriptor + 1) % ENTRIES;
            self.descriptor(*address, *len, flags, next);
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

    /// Makes a chain of writable buffers available that is in a table of its own.
    pub fn add_indirect(&mut self, table: u64, buffers: &[(u64, u32)]) {
        let count = buffers.len() as u16;
        for (index, (address, len)) in (0..count).zip(buffers) {
            let place = table + u64::from(index) * 16;
            let more = u32::from(index + 1 < count) * VRING_DESC_F_NEXT;
            self.write(place, &address.to_le_bytes());
            self.write(place + 8, &len.to_le_bytes());
            self.write(
                place + 12,
                &((VRING_DESC_F_WRITE | more) as u16).to_le_bytes(),
            );
            self.write(place + 14, &(index + 1).to_le_bytes());
        }
        let head = self.next_descriptor;
        self.descriptor(table, u32::from(count) * 16, VRING_DESC_F_INDIRECT, 0);
        self.publish(head);
    }

    /// The driver breaks its ring: more is available than there can be.
    pub fn break_ring(&self) {
        let broken = self.next_available.wrapping_add(ENTRIES * 2);
        self.write(self.start + AVAILABLE + 2, &broken.to_le_bytes());
    }

    /// Lengths of the used buffers, in order.
    pub fn used(&self) -> Vec<u32> {
        let used = self.start + USED;
        let u16_at = |address| u16::from_le_bytes(self.read(address, 2).try_into().unwrap());
        let count = u64::from(u16_at(used + 2));
        let len = |index| {
            let bytes = self.read(used + 4 + index * 8 + 4, 4);
            u32::from_le_bytes(bytes.try_into().unwrap())
        };
        (0..count).map(len).collect()
    }

    /// Waits until as many buffers have been used.
    pub fn wait_for_used(&self, count: usize) -> Vec<u32> {
        for _ in 0..3000 {
            let used = self.used();
            if used.len() >= count {
                return used;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("only {} of {count} buffers were used", self.used().len());
    }
}

/// A queue with a device's side of it.
pub struct TestRing {
    pub file: MemoryFile,
    pub memory: ServiceMemory<()>,
    pub ring: ServiceRing<()>,
    queue: TestQueue,
    rings: SharedRings<ServiceMemory<()>>,
}

impl std::ops::Deref for TestRing {
    type Target = TestQueue;

    fn deref(&self) -> &TestQueue {
        &self.queue
    }
}

impl std::ops::DerefMut for TestRing {
    fn deref_mut(&mut self) -> &mut TestQueue {
        &mut self.queue
    }
}

impl TestRing {
    /// Size of the guest's memory.
    pub const SIZE: u64 = 1 << 20;

    pub fn new() -> TestRing {
        Self::with_room(0)
    }

    /// With memory that may be added.
    pub fn with_room(room: u64) -> TestRing {
        let file = MemoryFile::new(Self::SIZE, room).unwrap();
        let memory = GuestMemoryAtomic::new(file.map().unwrap());
        let events = Arc::new(Events::new(1).unwrap());
        let mut rings = SharedRings::new(&memory, &[ENTRIES], events).unwrap();
        let guest = GuestMemoryMmap::clone(&memory.memory());
        let queue = TestQueue::new(guest, 0x1000);
        assert!(rings.start(1 << 32, &[queue.setup()]));
        TestRing {
            ring: rings.rings()[0].clone(),
            file,
            memory,
            queue,
            rings,
        }
    }

    /// The driver starts anew.
    pub fn reset(&mut self) {
        self.rings.stop();
        let start = self.queue.start;
        self.queue = TestQueue::new(self.queue.memory.clone(), start);
        self.queue.write(start + AVAILABLE, &[0; 4]);
        self.queue.write(start + USED, &[0; 4]);
        assert!(self.rings.start(1 << 32, &[self.queue.setup()]));
    }
}
