//! Drivers that say anything, for tests: chains and rings at random, from a fixed
//! seed. What a device answers does not matter, but that it ends, goes on working, and
//! touches nothing but the guest's memory and its own file.

use super::test_ring::TestRing;

/// Xorshift (Marsaglia, 2003).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 8
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Mostly small, sometimes at an edge, sometimes anything.
    pub fn number(&mut self, usual: u64) -> u64 {
        const EDGES: [u64; 6] = [0, 1, u64::MAX, u64::MAX / 512, 1 << 32, u64::MAX - 1];
        match self.below(8) {
            0 => EDGES[self.below(6) as usize],
            1 => self.next(),
            _ => self.below(usual),
        }
    }

    /// A buffer of the guest, which may be anywhere.
    pub fn buffer(&mut self) -> (u64, u32, bool) {
        let address = match self.below(8) {
            0 => self.next(),
            1 => TestRing::SIZE - self.below(64),
            _ => 0x8000 + self.below(0x20_000),
        };
        let len = match self.below(8) {
            0 => self.next() as u32,
            1 => 0,
            2 => 1,
            _ => self.below(2048) as u32,
        };
        (address, len, self.below(2) == 0)
    }
}

/// Has `work` handle so many chains, those of `request` among others, with broken rings
/// in between. The ring is as new afterwards.
pub fn drive(
    mut ring: TestRing,
    steps: usize,
    mut request: impl FnMut(&mut Random, &mut TestRing),
    mut work: impl FnMut(&TestRing),
) -> TestRing {
    let mut random = Random::new(0x5eed);
    for step in 0..steps {
        match random.below(64) {
            0 => ring.add_loop(),
            1 => {
                // Useless from now on, until a reset.
                ring.break_ring();
                work(&ring);
                ring.reset();
                continue;
            }
            2 => ring.add(&[]),
            3..16 => {
                let chain: Vec<_> = (0..=random.below(6)).map(|_| random.buffer()).collect();
                ring.add(&chain);
            }
            _ => request(&mut random, &mut ring),
        }
        if step % 3 == 0 {
            work(&ring);
        }
        if step % 16 == 15 {
            work(&ring);
            ring.reset();
        }
    }
    ring.reset();
    ring
}
