//! virtio-mem: memory that is added while the machine runs (VIRTIO 1.2, 5.15).
//!
//! A range of addresses without memory at first. The host says how much of it the guest
//! may have; the driver takes it block by block, and gives back what it cannot use.

use std::io;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::{buffers, work_through};
use crate::vm::builtin::memory::{MemoryFile, Range};
use crate::vm::builtin::virtio::config::Config;
use crate::vm::builtin::virtio::registers::Identity;
use crate::vm::builtin::virtio::rings::Events;
use crate::vm::builtin::virtio::worker::{Service, ServiceMemory, ServiceRing};
use crate::vm::devices::vhost_user::lock;

const QUEUE_SIZE: u16 = 64;
/// What is plugged and unplugged as a whole: a huge page.
const BLOCK: u64 = 2 << 20;

/// Fields of the configuration space (5.15.4).
mod field {
    pub const BLOCK_SIZE: usize = 0;
    pub const ADDRESS: usize = 16;
    pub const REGION_SIZE: usize = 24;
    pub const USABLE_SIZE: usize = 32;
    pub const PLUGGED_SIZE: usize = 40;
    pub const REQUESTED_SIZE: usize = 48;
    pub const LEN: usize = 56;
}

/// Types of requests (5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const REQUEST_LEN: usize = 24;

/// Answers.
const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

/// States of a range.
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// The range and what is in it, for the device's thread and for whoever makes the
/// machine larger.
pub struct MoreMemory {
    range: Range,
    file: MemoryFile,
    config: Config,
    state: Mutex<State>,
}

struct State {
    /// By block.
    plugged: Vec<bool>,
    requested: u64,
}

impl State {
    fn plugged_size(&self) -> u64 {
        self.plugged.iter().filter(|plugged| **plugged).count() as u64 * BLOCK
    }
}

impl MoreMemory {
    /// For a file that has room for it.
    pub fn new(file: &MemoryFile) -> Option<Arc<MoreMemory>> {
        let range = file.room()?;
        let mut config = vec![0; field::LEN];
        for (at, value) in [
            (field::BLOCK_SIZE, BLOCK),
            (field::ADDRESS, range.address),
            (field::REGION_SIZE, range.len),
        ] {
            config[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        Some(Arc::new(MoreMemory {
            range,
            file: file.clone(),
            config: config.into(),
            state: Mutex::new(State {
                // As many as there is room for.
                plugged: vec![false; (range.len / BLOCK) as usize],
                requested: 0,
            }),
        }))
    }

    pub fn identity(&self, features: u64) -> Identity {
        Identity {
            id: VIRTIO_ID_MEM,
            features,
            queues: vec![QUEUE_SIZE],
            config: self.config.clone(),
        }
    }

    /// Lets the guest have so much of the range, which has memory to there.
    pub fn offer(&self, size: u64, events: &Events) {
        let mut state = lock(&self.state);
        state.requested = size;
        let fields = [(field::USABLE_SIZE, size), (field::REQUESTED_SIZE, size)];
        self.config.change(&fields, true);
        drop(state);
        // Fails only when the counter is full, that is, when it is set already.
        let _ = events.call.write(1);
    }

    /// What the driver asks for: an answer, and the state it asked for.
    fn execute(&self, request: [u8; REQUEST_LEN]) -> (u16, u16) {
        let [a, b, _, _, _, _, _, _, rest @ ..] = request;
        let [address @ .., c, d, _, _, _, _, _, _] = rest;
        let kind = u16::from_le_bytes([a, b]);
        let mut state = lock(&self.state);
        if kind == UNPLUG_ALL {
            state.plugged.fill(false);
            let answer = self.give_back(self.range.address, self.range.len);
            self.note(&state);
            return (answer, 0);
        }
        let blocks = usize::from(u16::from_le_bytes([c, d]));
        let Some(first) = self.first_block(u64::from_le_bytes(address)) else {
            return (ERROR, 0);
        };
        let (requested, had) = (state.requested, state.plugged_size());
        let Some(range) = state.plugged.get_mut(first..first + blocks) else {
            return (ERROR, 0);
        };
        let size = blocks as u64 * BLOCK;
        let is_in_use = (first as u64 * BLOCK) + size <= requested;
        if range.is_empty() || !is_in_use {
            return (ERROR, 0);
        }
        let (some, all) = (range.contains(&true), !range.contains(&false));
        let answer = match kind {
            STATE if all => return (ACK, PLUGGED),
            STATE if some => return (ACK, MIXED),
            STATE => return (ACK, UNPLUGGED),
            PLUG if some => ERROR,
            PLUG if had + size > requested => NACK,
            PLUG => {
                range.fill(true);
                ACK
            }
            UNPLUG if !all => ERROR,
            UNPLUG => {
                range.fill(false);
                self.give_back(self.range.address + first as u64 * BLOCK, size)
            }
            _ => ERROR,
        };
        self.note(&state);
        (answer, 0)
    }

    fn first_block(&self, address: u64) -> Option<usize> {
        let offset = address.checked_sub(self.range.address)?;
        let inside = offset < self.range.len && offset.is_multiple_of(BLOCK);
        inside.then(|| usize::try_from(offset / BLOCK).ok())?
    }

    fn give_back(&self, address: u64, len: u64) -> u16 {
        match self.file.discard(GuestAddress(address), len) {
            Ok(()) => ACK,
            Err(e) => {
                log::warn!("memory: giving it back: {e}");
                ERROR
            }
        }
    }

    fn note(&self, state: &State) {
        let plugged = state.plugged_size();
        // The driver did it itself.
        self.config.change(&[(field::PLUGGED_SIZE, plugged)], false);
    }
}

/// The device's thread.
pub struct Plugger {
    pub more: Arc<MoreMemory>,
    pub memory: ServiceMemory<()>,
}

impl Service for Plugger {
    type Bitmap = ();

    fn handle(&self, _event: u16, rings: &[ServiceRing<()>]) -> io::Result<()> {
        let memory = self.memory.memory();
        for ring in rings {
            work_through("memory", ring, &memory, |memory, chain| {
                self.answer(memory, chain)
            });
        }
        Ok(())
    }
}

impl Plugger {
    fn answer(&self, memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
        let Some((mut readable, writable)) = buffers::of_chain(memory, chain) else {
            return 0;
        };
        let (answer, state) = match readable.take() {
            Some(request) => self.more.execute(request),
            None => (ERROR, 0),
        };
        let mut response = [0; 10];
        response[..2].copy_from_slice(&answer.to_le_bytes());
        response[8..].copy_from_slice(&state.to_le_bytes());
        // Ten bytes at most.
        writable.write(&response) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::super::hostile;
    use super::super::test_ring::TestRing;
    use super::*;

    const ROOM: u64 = 512 << 20;

    struct Driver {
        ring: TestRing,
        plugger: Plugger,
        start: u64,
    }

    impl Driver {
        fn new() -> Driver {
            let ring = TestRing::with_room(ROOM);
            let more = MoreMemory::new(&ring.file).unwrap();
            Driver {
                start: ring.file.room().unwrap().address,
                plugger: Plugger {
                    more,
                    memory: ring.memory.clone(),
                },
                ring,
            }
        }

        fn offer(&self, size: u64) {
            self.plugger.more.offer(size, &Events::new(1).unwrap());
        }

        fn request(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
            self.ring.write(0x8000, &kind.to_le_bytes());
            self.ring.write(0x8008, &address.to_le_bytes());
            self.ring.write(0x8010, &blocks.to_le_bytes());
            self.ring.add(&[(0x8000, 24, false), (0x9000, 10, true)]);
            self.work();
            let answer = self.ring.read(0x9000, 10);
            let u16_at = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
            (u16_at(0), u16_at(8))
        }

        fn work(&self) {
            let rings = std::slice::from_ref(&self.ring.ring);
            self.plugger.handle(0, rings).unwrap();
        }

        fn field(&self, at: usize) -> u64 {
            self.plugger.more.config.field(at)
        }
    }

    #[test]
    fn the_guest_gets_what_it_is_offered_and_no_more() {
        let mut driver = Driver::new();
        let start = driver.start;
        assert_eq!(driver.field(field::REGION_SIZE), ROOM);
        assert_eq!(driver.request(PLUG, start, 1), (ERROR, 0));
        let before = driver.plugger.more.config.generation();
        driver.offer(4 * BLOCK);
        assert!(driver.plugger.more.config.is_changed());
        assert_ne!(driver.plugger.more.config.generation(), before);
        assert_eq!(driver.field(field::REQUESTED_SIZE), 4 * BLOCK);
        assert_eq!(driver.request(PLUG, start, 3), (ACK, 0));
        assert_eq!(driver.field(field::PLUGGED_SIZE), 3 * BLOCK);
        assert_eq!(driver.request(PLUG, start, 1), (ERROR, 0));
        assert_eq!(driver.request(PLUG, start + 4 * BLOCK, 1), (ERROR, 0));
        assert_eq!(driver.request(STATE, start, 3), (ACK, PLUGGED));
        assert_eq!(driver.request(STATE, start, 4), (ACK, MIXED));
        assert_eq!(
            driver.request(STATE, start + 3 * BLOCK, 1),
            (ACK, UNPLUGGED)
        );
        driver.offer(8 * BLOCK);
        assert_eq!(driver.request(PLUG, start + 3 * BLOCK, 5), (ACK, 0));
        driver.ring.write(start + BLOCK, b"data");
        assert_eq!(driver.request(UNPLUG, start + BLOCK, 1), (ACK, 0));
        assert_eq!(driver.ring.read(start + BLOCK, 4), [0; 4]);
        assert_eq!(driver.request(UNPLUG, start + BLOCK, 1), (ERROR, 0));
        assert_eq!(driver.field(field::PLUGGED_SIZE), 7 * BLOCK);
        assert_eq!(driver.request(UNPLUG_ALL, 0, 0), (ACK, 0));
        assert_eq!(driver.field(field::PLUGGED_SIZE), 0);
    }

    #[test]
    fn malformed_requests_change_nothing() {
        let mut driver = Driver::new();
        driver.offer(ROOM);
        let start = driver.start;
        for (kind, address, blocks) in [
            (PLUG, start + 1, 1),
            (PLUG, start, 0),
            (PLUG, start - BLOCK, 1),
            (PLUG, 0, 1),
            (PLUG, u64::MAX, u16::MAX),
            (PLUG, start + ROOM - BLOCK, 2),
            (PLUG, start, u16::MAX),
            (UNPLUG, start, 1),
            (STATE, start + ROOM, 1),
            (9, start, 1),
        ] {
            let answer = driver.request(kind, address, blocks);
            assert_eq!(answer, (ERROR, 0), "{kind} {address:#x} {blocks}");
        }
        driver.ring.write(0x9000, &[0xee; 10]);
        driver.ring.add(&[(0x8000, 23, false), (0x9000, 1, true)]);
        driver.ring.add(&[(0x9000, 10, true)]);
        driver.ring.add(&[(1 << 50, 24, false), (0x9000, 10, true)]);
        driver.ring.add(&[(0x8000, 24, false)]);
        driver.ring.add_loop();
        driver.work();
        assert_eq!(driver.field(field::PLUGGED_SIZE), 0);
    }

    #[test]
    fn no_sequence_of_requests_gets_more_than_was_offered() {
        let Driver {
            ring,
            plugger,
            start,
        } = Driver::new();
        let offered = 16 * BLOCK;
        plugger.more.offer(offered, &Events::new(1).unwrap());
        let request = |random: &mut hostile::Random, ring: &mut TestRing| {
            let kind = random.below(5) as u16;
            let address = start.wrapping_add(random.number(20).wrapping_mul(BLOCK));
            ring.write(0x8000, &kind.to_le_bytes());
            ring.write(0x8008, &address.to_le_bytes());
            ring.write(0x8010, &(random.number(6) as u16).to_le_bytes());
            ring.add(&[(0x8000, 24, false), (0x9000, 10, true)]);
        };
        let _ = hostile::drive(ring, 20_000, request, |ring| {
            let rings = std::slice::from_ref(&ring.ring);
            plugger.handle(0, rings).unwrap();
            let plugged = lock(&plugger.more.state).plugged_size();
            assert!(plugged <= offered, "{plugged}");
        });
    }
}
