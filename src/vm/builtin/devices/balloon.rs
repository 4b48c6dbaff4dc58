//! virtio-balloon, of which only free page reporting is offered (VIRTIO 1.2,
//! 5.5.6.7): the guest says which of its memory it does not use, and the host gets it
//! back. The guest takes it up again by touching it.

use std::io;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::work_through;
use crate::vm::builtin::memory::MemoryFile;
use crate::vm::builtin::virtio::registers::Identity;
use crate::vm::builtin::virtio::worker::{Service, ServiceMemory, ServiceRing};

/// VIRTIO_BALLOON_F_REPORTING.
const REPORTING: u64 = 1 << 5;
const QUEUE_SIZE: u16 = 32;
/// Queues for a balloon that is never asked to grow, and that of reports.
const QUEUES: usize = 3;
const REPORTS: usize = 2;
/// Target and size of the balloon, in pages.
const CONFIG: [u8; 8] = [0; 8];

/// Without reports, of memory that the host does not take back.
pub fn identity(features: u64, takes_reports: bool) -> Identity {
    Identity {
        id: VIRTIO_ID_BALLOON,
        features: features | if takes_reports { REPORTING } else { 0 },
        queues: vec![QUEUE_SIZE; QUEUES],
        config: CONFIG.to_vec().into(),
    }
}

pub struct Balloon {
    pub file: MemoryFile,
    pub memory: ServiceMemory<()>,
}

impl Service for Balloon {
    type Bitmap = ();

    fn handle(&self, event: u16, rings: &[ServiceRing<()>]) -> io::Result<()> {
        // What the guest would put into the balloon stays its own: it was not asked.
        let reports = usize::from(event) == REPORTS;
        let Some(ring) = rings.get(usize::from(event)) else {
            return Ok(());
        };
        work_through("balloon", ring, &self.memory.memory(), |_, chain| {
            if reports {
                self.discard(chain);
            }
            0
        });
        Ok(())
    }
}

impl Balloon {
    fn discard(&self, chain: DescriptorChain<&GuestMemoryMmap>) {
        // The guest may only give away what the device may write to. Linux reports no more at
        // once than the queue holds; a chain that goes round would have the kernel give the
        // same back for seconds.
        for pages in chain.writable().take(usize::from(QUEUE_SIZE)) {
            if let Err(e) = self.file.discard(pages.addr(), pages.len().into()) {
                log::warn!("balloon: giving memory back: {e}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::hostile;
    use super::super::test_ring::TestRing;
    use super::*;

    fn report(ring: &TestRing, event: u16) {
        let balloon = Balloon {
            file: ring.file.clone(),
            memory: ring.memory.clone(),
        };
        let rings = [ring.ring.clone(), ring.ring.clone(), ring.ring.clone()];
        balloon.handle(event, &rings).unwrap();
    }

    #[test]
    fn reported_pages_go_back_to_the_host() {
        let mut ring = TestRing::new();
        for address in [0x20_000, 0x30_000, 0x40_000] {
            ring.write(address, b"data");
        }
        ring.add(&[(0x20_000, 0x1000, true), (0x30_000, 0x1000, true)]);
        // Not writable, not memory, and around the end of it.
        ring.add(&[(0x40_000, 0x1000, false)]);
        ring.add(&[(1 << 40, 0x1000, true), (u64::MAX - 8, u32::MAX, true)]);
        report(&ring, 2);
        assert_eq!(ring.used(), [0, 0, 0]);
        assert_eq!(ring.read(0x20_000, 4), [0; 4]);
        assert_eq!(ring.read(0x30_000, 4), [0; 4]);
        assert_eq!(ring.read(0x40_000, 4), b"data");
    }

    #[test]
    fn a_report_is_not_longer_than_its_queue() {
        let mut ring = TestRing::new();
        let pages = (0..QUEUE_SIZE).map(|n| (0x20_000 + u64::from(n) * 0x1000, 0x1000));
        let pages: Vec<_> = pages.chain([(0x80_000, 0x1000)]).collect();
        for (address, _) in &pages {
            ring.write(*address, b"data");
        }
        ring.add_indirect(0x10_000, &pages);
        report(&ring, 2);
        assert_eq!(ring.used(), [0]);
        assert_eq!(ring.read(0x20_000, 4), [0; 4]);
        assert_eq!(ring.read(0x20_000 + 31 * 0x1000, 4), [0; 4]);
        assert_eq!(ring.read(0x80_000, 4), b"data");
    }

    #[test]
    fn the_balloon_itself_takes_nothing() {
        let mut ring = TestRing::new();
        ring.write(0x20_000, b"data");
        ring.add(&[(0x20_000, 0x1000, true)]);
        report(&ring, 0);
        assert_eq!(ring.read(0x20_000, 4), b"data");
    }

    #[test]
    fn no_sequence_of_chains_ends_it() {
        let ring = TestRing::new();
        let balloon = Balloon {
            file: ring.file.clone(),
            memory: ring.memory.clone(),
        };
        let request = |random: &mut hostile::Random, ring: &mut TestRing| {
            let buffer = random.buffer();
            ring.add(&[buffer]);
        };
        let mut ring = hostile::drive(ring, 10_000, request, |ring| {
            balloon
                .handle(
                    2,
                    &[ring.ring.clone(), ring.ring.clone(), ring.ring.clone()],
                )
                .unwrap();
        });
        ring.add(&[(0x20_000, 0x1000, true)]);
        balloon
            .handle(
                2,
                &[ring.ring.clone(), ring.ring.clone(), ring.ring.clone()],
            )
            .unwrap();
        assert_eq!(ring.used().len(), 1);
    }
}
