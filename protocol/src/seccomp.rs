//! The system call filter of a container's processes: the host compiles what
//! config.json says, the guest only loads it. Compiling takes libseccomp millions of
//! instructions, which an emulated guest would execute for every process.

/// Bytes of an instruction (`struct sock_filter`).
pub const INSTRUCTION: usize = 8;
/// Most instructions a kernel takes (`BPF_MAXINSNS`).
pub const MAX_INSTRUCTIONS: usize = 4096;

/// Flags of seccomp(2) that a filter may have.
pub const FLAG_TSYNC: u32 = 1;
pub const FLAG_LOG: u32 = 1 << 1;
pub const FLAG_SPEC_ALLOW: u32 = 1 << 2;
const FLAGS: u32 = FLAG_TSYNC | FLAG_LOG | FLAG_SPEC_ALLOW;

/// A compiled filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Of seccomp(2).
    pub flags: u32,
    /// Instructions of classic BPF in the byte order of the machine.
    pub program: Vec<u8>,
}

impl Filter {
    /// The flags in little endian, then the program.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.flags.to_le_bytes().to_vec();
        bytes.extend_from_slice(&self.program);
        bytes
    }

    /// `None` for what is not a filter. Whether the program makes sense is the
    /// kernel's to judge.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Filter> {
        let (flags, program) = bytes.split_first_chunk()?;
        let flags = u32::from_le_bytes(*flags);
        let instructions = program.len() / INSTRUCTION;
        let is_whole = program.len() % INSTRUCTION == 0;
        let fits = (1..=MAX_INSTRUCTIONS).contains(&instructions);
        (flags & !FLAGS == 0 && is_whole && fits).then(|| Filter {
            flags,
            program: program.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(flags: u32, instructions: usize) -> Filter {
        Filter {
            flags,
            program: vec![6; instructions * INSTRUCTION],
        }
    }

    #[test]
    fn a_filter_survives_the_way() {
        for filter in [filter(FLAGS, 1), filter(0, MAX_INSTRUCTIONS)] {
            assert_eq!(Filter::decode(&filter.encode()), Some(filter));
        }
    }

    #[test]
    fn what_is_not_a_filter_is_refused() {
        for bad in [
            filter(1 << 3, 1),
            filter(0, 0),
            filter(0, MAX_INSTRUCTIONS + 1),
        ] {
            assert_eq!(Filter::decode(&bad.encode()), None, "{:x}", bad.flags);
        }
        let mut torn = filter(0, 2).encode();
        torn.pop();
        assert_eq!(Filter::decode(&torn), None);
        assert_eq!(Filter::decode(&[0, 0, 0]), None);
    }
}
