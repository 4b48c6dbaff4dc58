//! virtio-rng: random bytes of the host for the guest.

use std::io;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};

use super::work_through;
use crate::sys::random;
use crate::vm::builtin::virtio::registers::Identity;
use crate::vm::builtin::virtio::worker::{Service, ServiceMemory, ServiceRing};

const QUEUE_SIZE: u16 = 64;
/// Most bytes for one request. Drivers ask for a few dozen.
const MAX_BYTES: usize = 4096;

pub fn identity(features: u64) -> Identity {
    Identity {
        id: VIRTIO_ID_RNG,
        features,
        queues: vec![QUEUE_SIZE],
        config: Vec::new().into(),
    }
}

pub struct Rng {
    pub memory: ServiceMemory<()>,
}

impl Service for Rng {
    type Bitmap = ();

    fn handle(&self, _event: u16, rings: &[ServiceRing<()>]) -> io::Result<()> {
        let memory = self.memory.memory();
        for ring in rings {
            work_through("rng", ring, &memory, fill);
        }
        Ok(())
    }
}

/// Fills the buffers of a request; the number of bytes.
fn fill(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
    let mut filled = 0;
    for buffer in chain.writable() {
        let len = (buffer.len() as usize).min(MAX_BYTES - filled);
        // What is not memory gets nothing.
        let random = random(len);
        if len == 0 || random.is_none_or(|r| memory.write_slice(&r, buffer.addr()).is_err()) {
            break;
        }
        filled += len;
    }
    // At most MAX_BYTES.
    filled as u32
}

fn random(len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0u8; len];
    random::fill(&mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::hostile;
    use super::super::test_ring::TestRing;
    use super::*;

    fn answer(ring: &TestRing) {
        let rng = Rng {
            memory: ring.memory.clone(),
        };
        rng.handle(0, std::slice::from_ref(&ring.ring)).unwrap();
    }

    #[test]
    fn buffers_are_filled_up_to_a_bound() {
        let mut ring = TestRing::new();
        ring.add(&[(0x10_000, 64, true)]);
        ring.add(&[(0x20_000, 3000, true), (0x21_000, 3000, true)]);
        answer(&ring);
        assert_eq!(ring.used(), [64, 4096]);
        let bytes = ring.read(0x10_000, 64);
        assert!(bytes.iter().any(|byte| *byte != 0));
        assert!(ring.read(0x21_000 + 1096, 64).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn malformed_requests_get_nothing() {
        let mut ring = TestRing::new();
        // Not writable, not memory, nearly not memory, empty, without end.
        ring.add(&[(0x10_000, 64, false)]);
        ring.add(&[(1 << 40, 64, true)]);
        ring.add(&[(TestRing::SIZE - 32, 64, true)]);
        ring.add(&[(0x10_000, 0, true)]);
        ring.add_loop();
        answer(&ring);
        let used = ring.used();
        assert_eq!(used[..4], [0, 0, 0, 0]);
        assert!(used[4] <= 4096);
    }

    #[test]
    fn no_sequence_of_chains_ends_it() {
        let ring = TestRing::new();
        let rng = Rng {
            memory: ring.memory.clone(),
        };
        let request = |random: &mut hostile::Random, ring: &mut TestRing| {
            let buffer = random.buffer();
            ring.add(&[buffer]);
        };
        let mut ring = hostile::drive(ring, 10_000, request, |ring| {
            rng.handle(0, std::slice::from_ref(&ring.ring)).unwrap();
        });
        ring.add(&[(0x20_000, 0x1000, true)]);
        rng.handle(0, std::slice::from_ref(&ring.ring)).unwrap();
        assert_eq!(ring.used().len(), 1);
    }
}
