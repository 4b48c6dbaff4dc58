//! Reproducible data that does not compress and does not repeat, so that a lost,
//! doubled or swapped block is seen.

use std::io::{self, Write};

/// xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift
/// generators, scrambled", 2016).
pub struct Prng(u64);

impl Prng {
    /// Zero is the one state the generator cannot leave, so it is avoided.
    #[must_use]
    pub fn new(seed: u64) -> Prng {
        Prng(seed.wrapping_mul(2) | 1)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }

    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let bytes = self.next_u64().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// `len` bytes of the sequence that belongs to `seed`.
#[must_use]
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    Prng::new(seed).fill(&mut out);
    out
}

/// The same bytes written block by block; `len` is a multiple of 64 KiB.
///
/// # Errors
/// The writer's.
pub fn write(seed: u64, len: usize, mut out: impl Write) -> io::Result<()> {
    let mut prng = Prng::new(seed);
    let mut block = vec![0; 64 * 1024];
    for _ in 0..len / block.len() {
        prng.fill(&mut block);
        out.write_all(&block)?;
    }
    Ok(())
}
