//! Entry points for fuzz targets: what reads the words of a guest, called with any
//! words. `fuzz/` has a target for each; `docs/testing.md` says how to run them.
//!
//! An entry point makes real objects of the code it is about, and touches nothing
//! outside of this process but descriptors and private temporary directories it made.
//! What must never happen is an assertion there, so a run that ends in any other way
//! than by returning is a finding. Under `cfg(test)` the inputs that were kept in
//! `fuzz/corpus` run as unit tests.

mod input;

pub use crate::agent_client::fuzzing::{agent_answers, agent_client};
pub use crate::vm::fuzzing::*;
pub use input::Input;

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// That of its file in `fuzz/fuzz_targets`, and of its directory in `fuzz/corpus`.
    pub name: &'static str,
    pub run: fn(&[u8]),
}

/// A table of entry points by their names.
macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        &[$(Target { name: stringify!($name), run: $name }),*]
    };
}

/// All of this crate's.
pub const TARGETS: &[Target] = targets![
    agent_answers,
    agent_client,
    balloon,
    block,
    console,
    fs,
    more_memory,
    net,
    qmp,
    registers,
    rng,
    snapshot,
    vhost_user,
    vsock,
    vsock_packets,
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// The inputs of a target: those of its corpus, and a few that nobody has to keep.
    fn inputs(name: &str) -> Vec<Vec<u8>> {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        let mut inputs = vec![Vec::new(), vec![0; 64], vec![0xff; 64]];
        inputs.push((0..=255).collect());
        let kept = std::fs::read_dir(corpus.join(name))
            .unwrap_or_else(|e| panic!("the corpus of {name}: {e}"));
        let before = inputs.len();
        inputs.extend(kept.map(|entry| std::fs::read(entry.unwrap().path()).unwrap()));
        assert!(inputs.len() > before, "the corpus of {name} is empty");
        inputs
    }

    /// Xorshift (Marsaglia, 2003).
    fn random(seed: &mut u64) -> u64 {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        *seed >> 8
    }

    #[test]
    fn no_input_at_random_does_harm() {
        let mut seed = 0x5eed;
        for target in TARGETS {
            for _ in 0..100 {
                let len = random(&mut seed) % 600;
                let input: Vec<u8> = (0..len).map(|_| random(&mut seed) as u8).collect();
                (target.run)(&input);
            }
        }
    }

    #[test]
    fn every_input_that_was_kept_still_does_no_harm() {
        for target in TARGETS {
            for input in inputs(target.name) {
                (target.run)(&input);
            }
        }
    }
}
