//! What a device may do to memory and used rings, worked out from what the driver has
//! written, without the library that the device uses.

use std::collections::BTreeSet;
use std::ops::Range;

use vhost_user_backend::VringT;
use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::QueueT;
use vm_memory::mmap::NewBitmap;

use super::chain::Descriptor;
use super::{Driver, Queue, Rings, SIZE, ServiceMemory, SharedRings};

/// The state before the device works.
pub struct Oracle {
    memory: Vec<u8>,
    /// What may change.
    writable: Vec<Range<u64>>,
    queues: Vec<Expected>,
    /// The device may change what it is about to read: descriptors, rings. Then all that
    /// is certain is that it ends.
    shifting: bool,
}

/// Of a queue.
struct Expected {
    queue: Queue,
    number: usize,
    /// The device's own count: a driver may write to the one in memory.
    used_index: u16,
    /// Heads that may be used, with the room in their writable buffers, if that is clear.
    heads: Vec<(u16, Option<u64>)>,
}

/// Makes one of those that overlap, so that there are few.
fn merge(ranges: &mut Vec<Range<u64>>) {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let together = next.start <= last.end;
        if together {
            last.end = last.end.max(next.end);
        }
        together
    });
}

/// How many buffers the device has used of a queue.
fn next_used<B: NewBitmap + Clone + Send + Sync + 'static>(
    driver: &Driver<B>,
    number: usize,
) -> u16 {
    driver.rings[number].get_ref().get_queue().next_used()
}

impl Oracle {
    pub fn new<B: NewBitmap + Clone + Send + Sync + 'static>(driver: &Driver<B>) -> Oracle
    where
        SharedRings<ServiceMemory<B>>: Rings,
    {
        let mut memory = vec![0; SIZE as usize];
        driver.read(0, &mut memory);
        let mut oracle = Oracle {
            memory,
            writable: Vec::new(),
            queues: Vec::new(),
            shifting: false,
        };
        let mut read = Vec::new();
        let mut buffers = Vec::new();
        for (number, queue) in driver.queues.iter().enumerate() {
            if !queue.setup.ready || queue.setup.size == 0 {
                continue;
            }
            let setup = queue.setup;
            let size = u64::from(setup.size);
            read.push(setup.descriptors..setup.descriptors + size * 16);
            read.push(setup.available..setup.available + 6 + size * 2);
            oracle.writable.push(setup.used..setup.used + 6 + size * 8);
            let heads = (0..setup.size)
                .map(|n| oracle.u16_at(setup.available + 4 + u64::from(n) * 2))
                .map(|head| (head, oracle.follow(queue, head, &mut buffers, &mut read)))
                .collect();
            oracle.queues.push(Expected {
                queue: *queue,
                number,
                used_index: next_used(driver, number),
                heads,
            });
        }
        let rings = oracle.writable.clone();
        merge(&mut buffers);
        merge(&mut read);
        let overlaps = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        let any = |these: &[Range<u64>], those: &[Range<u64>]| {
            these.iter().any(|a| those.iter().any(|b| overlaps(a, b)))
        };
        let one_in_another = (1..rings.len()).any(|n| any(&rings[..n], &rings[n..=n]));
        oracle.shifting =
            any(&buffers, &read) || any(&buffers, &rings) || any(&rings, &read) || one_in_another;
        oracle.writable.extend(buffers);
        oracle
    }

    fn u16_at(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    /// What is there; zeros where there is no memory.
    fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let start = usize::try_from(at).unwrap_or(usize::MAX);
        if let Some(all) = self.memory.get(start..start.saturating_add(N)) {
            bytes.copy_from_slice(all);
        } else if let Some(some) = self.memory.get(start..) {
            bytes[..some.len()].copy_from_slice(some);
        }
        bytes
    }

    fn descriptor(&self, table: u64, index: u16) -> Descriptor {
        Descriptor::decode(&self.bytes(table.wrapping_add(u64::from(index) * 16)))
    }

    /// Adds the writable buffers that can be reached from a head, and the tables on the
    /// way; the room in them, unless a descriptor comes twice.
    fn follow(
        &self,
        queue: &Queue,
        head: u16,
        buffers: &mut Vec<Range<u64>>,
        tables: &mut Vec<Range<u64>>,
    ) -> Option<u64> {
        let (mut table, mut size) = (queue.setup.descriptors, u32::from(queue.setup.size));
        let (mut index, mut room) = (head, 0u64);
        let (mut indirect, mut seen) = (false, BTreeSet::new());
        loop {
            if u32::from(index) >= size {
                return Some(room);
            }
            if !seen.insert(index) {
                // It goes round.
                return None;
            }
            let descriptor = self.descriptor(table, index);
            let has = |flag: u32| u32::from(descriptor.flags) & flag != 0;
            if has(VRING_DESC_F_INDIRECT) {
                if indirect {
                    return None;
                }
                indirect = true;
                table = descriptor.address;
                size = (descriptor.len / 16).min(1 << 16);
                tables.push(table..table.saturating_add(u64::from(descriptor.len)));
                index = 0;
                seen.clear();
                continue;
            }
            if has(VRING_DESC_F_WRITE) {
                let start = descriptor.address;
                buffers.push(start..start.saturating_add(descriptor.len.into()));
                room += u64::from(descriptor.len);
            }
            if !has(VRING_DESC_F_NEXT) {
                return Some(room);
            }
            index = descriptor.next;
        }
    }

    /// The device has worked.
    pub fn check<B: NewBitmap + Clone + Send + Sync + 'static>(&self, driver: &Driver<B>)
    where
        SharedRings<ServiceMemory<B>>: Rings,
    {
        if self.shifting {
            return;
        }
        let mut now = vec![0; SIZE as usize];
        driver.read(0, &mut now);
        let mut fixed: Vec<bool> = vec![true; now.len()];
        for range in &self.writable {
            let end = range.end.min(SIZE) as usize;
            let start = (range.start as usize).min(end);
            fixed[start..end].fill(false);
        }
        const PIECE: usize = 256;
        let pieces = self.memory.chunks(PIECE).zip(now.chunks(PIECE)).enumerate();
        // Most of it is as it was.
        for (number, (before, after)) in pieces.filter(|(_, (before, after))| before != after) {
            for (n, (before, after)) in before.iter().zip(after).enumerate() {
                let at = number * PIECE + n;
                assert!(
                    before == after || !fixed[at],
                    "byte {at:#x}, which is nobody's to write to, has changed"
                );
            }
        }
        let after = Oracle {
            memory: now,
            writable: Vec::new(),
            queues: Vec::new(),
            shifting: false,
        };
        for expected in &self.queues {
            expected.check(&after, next_used(driver, expected.number));
        }
    }
}

impl Expected {
    fn check(&self, after: &Oracle, used_index: u16) {
        let setup = self.queue.setup;
        let used = used_index.wrapping_sub(self.used_index);
        assert!(used == 0 || after.u16_at(setup.used + 2) == used_index);
        let most = setup.size;
        assert!(used <= most, "{used} buffers of a queue of {most}");
        for n in 0..used {
            let place = self.used_index.wrapping_add(n) % setup.size;
            let [h0, h1, _, _, len @ ..]: [u8; 8] =
                after.bytes(setup.used + 4 + u64::from(place) * 8);
            let (head, len) = (u16::from_le_bytes([h0, h1]), u32::from_le_bytes(len));
            let mut rooms = self.heads.iter().filter(|known| known.0 == head).peekable();
            assert!(rooms.peek().is_some(), "{head} was never available");
            assert!(
                rooms.any(|(_, room)| room.is_none_or(|room| u64::from(len) <= room)),
                "{len} bytes were written to a chain that has not the room"
            );
        }
    }
}
