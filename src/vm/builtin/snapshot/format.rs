//! The file `state` of a template.
//!
//! A first line says what it is, in which version, how long the rest is and its CRC-32; the
//! rest is JSON. Structures of KVM are in it as the bytes they are ([`super::plain`]). All numbers
//! have bounds, and what is not known is refused.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use super::Error;
use super::fit::MadeFor;
use super::plain::Plain;
use crate::vm::builtin::MAX_VCPUS;
use crate::vm::builtin::layout::BOOT_SLOTS;
use crate::vm::builtin::memory::Extent;
use crate::vm::builtin::ports::SavedSerial;
use crate::vm::builtin::virtio::saved::SavedDevice;

/// Another one with each change of anything in here, or of what it means.
pub const VERSION: u32 = 1;
pub const MAGIC: &str = "kuasar-runv-template";
/// A machine with 64 processors has 2 MiB.
const MAX_BYTES: u64 = 16 << 20;
/// The first line is shorter.
const MAX_HEADER: usize = 128;
/// Each is a mapping of the process, of which Linux allows 65530.
pub const MAX_EXTENTS: usize = 8192;
const MAX_MSRS: usize = 2048;
/// Linux takes no more.
const MAX_CPUID: usize = 256;
const PAGE: u64 = 4096;

/// Everything about a machine but its memory.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    pub made_for: MadeFor,
    /// Seconds since 1970.
    pub created: u64,
    /// What is in the file `memory`; the rest is zero.
    pub extents: Vec<Extent>,
    pub chips: Chips,
    pub processors: Vec<Processor>,
    pub serial: SavedSerial,
    /// By slot.
    pub devices: Vec<SavedDevice>,
}

/// What KVM has besides processors.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chips {
    /// Two PICs and the I/O APIC.
    pub interrupts: [Plain<kvm_irqchip>; 3],
    pub timer: Plain<kvm_pit_state2>,
    pub clock: Plain<kvm_clock_data>,
}

/// A virtual processor.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processor {
    pub cpuid: Vec<Plain<kvm_cpuid_entry2>>,
    pub tsc_khz: u32,
    pub activity: Plain<kvm_mp_state>,
    pub regs: Plain<kvm_regs>,
    pub sregs: Plain<kvm_sregs>,
    pub xsave: Plain<kvm_xsave>,
    pub xcrs: Plain<kvm_xcrs>,
    pub debug: Plain<kvm_debugregs>,
    pub lapic: Plain<kvm_lapic_state>,
    pub events: Plain<kvm_vcpu_events>,
    /// Number and value.
    pub msrs: Vec<(u32, u64)>,
}

impl State {
    /// Writes a new file.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let failed = Error::file(path);
        let json = serde_json::to_vec(self).map_err(|e| failed(e.into()))?;
        let write = || -> io::Result<()> {
            use std::os::unix::fs::OpenOptionsExt;
            let mut options = File::options();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path)?;
            let (len, sum) = (json.len(), crc32fast::hash(&json));
            writeln!(file, "{MAGIC} {VERSION} {len} {sum:08x}")?;
            file.write_all(&json)?;
            file.sync_all()
        };
        write().map_err(failed)
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// It is not there, or not what [`write`](Self::write) has written.
    pub fn read(path: &Path) -> Result<State, Error> {
        let failed = Error::file(path);
        let file = File::open(path).map_err(&failed)?;
        let mut bytes = Vec::new();
        let read = file.take(MAX_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(&failed)?;
        Self::parse(&bytes).map_err(|what| Error::invalid(path, what))
    }

    pub fn parse(bytes: &[u8]) -> Result<State, String> {
        if bytes.len() as u64 > MAX_BYTES {
            return Err("it is too long".into());
        }
        let head = &bytes[..bytes.len().min(MAX_HEADER)];
        let end = head.iter().position(|byte| *byte == b'\n');
        let end = end.ok_or("it has no first line")?;
        let line = std::str::from_utf8(&bytes[..end]).map_err(|_| "its first line is no text")?;
        let body = &bytes[end + 1..];
        let mut words = line.split(' ');
        if words.next() != Some(MAGIC) {
            return Err("it is no template".into());
        }
        let version = words.next().unwrap_or_default();
        if version != VERSION.to_string() {
            return Err(format!("its version is {version}, not {VERSION}"));
        }
        if words.next() != Some(body.len().to_string().as_str()) {
            return Err("it was cut off".into());
        }
        let sum = format!("{:08x}", crc32fast::hash(body));
        if (words.next(), words.next()) != (Some(sum.as_str()), None) {
            return Err("it is damaged: its checksum is wrong".into());
        }
        let state: State = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        state.check()?;
        Ok(state)
    }

    /// What other code relies on.
    fn check(&self) -> Result<(), String> {
        let size = self.made_for.size;
        let memory = u64::from(size.memory_mib) << 20;
        let is_fine = |extent: &Extent| {
            let aligned = extent.offset.is_multiple_of(PAGE) && extent.len.is_multiple_of(PAGE);
            let end = extent.offset.checked_add(extent.len);
            aligned && extent.len > 0 && end.is_some_and(|end| end <= memory)
        };
        let in_order = |pair: &[Extent]| pair[0].offset + pair[0].len <= pair[1].offset;
        let vcpus = self.processors.len();
        let what = if self.extents.len() > MAX_EXTENTS {
            "too many pieces of memory"
        } else if !self.extents.iter().all(is_fine) || !self.extents.windows(2).all(in_order) {
            "pieces of memory that cannot be"
        } else if vcpus == 0 || vcpus > MAX_VCPUS as usize || vcpus != size.vcpus as usize {
            "another number of processors than the machine has"
        } else if self.processors.iter().any(|p| p.msrs.len() > MAX_MSRS) {
            "too many registers"
        } else if self.processors.iter().any(|p| p.cpuid.len() > MAX_CPUID) {
            "too many leaves of CPUID"
        } else if self.devices.len() > BOOT_SLOTS {
            "more devices than there are slots"
        } else {
            return Ok(());
        };
        Err(format!("it has {what}"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{file, state};
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        state().write(&path).unwrap();
        assert_eq!(State::read(&path).unwrap(), state());
        assert!(state().write(&path).is_err(), "it exists");
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_file_that_was_cut_off_or_changed_anywhere_is_refused() {
        let bytes = file(&serde_json::to_vec(&state()).unwrap());
        assert!(State::parse(&bytes).is_ok());
        for len in (0..bytes.len()).step_by(97) {
            assert!(State::parse(&bytes[..len]).is_err(), "{len}");
        }
        for at in (0..bytes.len()).step_by(61) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert!(State::parse(&bytes).is_err(), "{at}");
        }
        let mut longer = bytes.clone();
        longer.push(b' ');
        assert_eq!(State::parse(&longer).unwrap_err(), "it was cut off");
        assert!(State::parse(&vec![b'{'; MAX_BYTES as usize + 1]).is_err());
        let other = String::from_utf8(bytes).unwrap().replacen(" 1 ", " 2 ", 1);
        let e = State::parse(other.as_bytes()).unwrap_err();
        assert_eq!(e, "its version is 2, not 1");
    }

    #[test]
    fn what_no_machine_can_be_is_refused_whatever_the_checksum_says() {
        let parse = |change: fn(&mut State)| {
            let mut state = state();
            change(&mut state);
            State::parse(&file(&serde_json::to_vec(&state).unwrap()))
        };
        assert!(parse(|_| {}).is_ok());
        let changes: [fn(&mut State); 11] = [
            |s| s.extents[1].offset = 0x800,
            |s| s.extents[1].offset = 0,
            |s| s.extents[1].len = 0,
            |s| s.extents[1].len = 16 << 20,
            |s| s.extents[1].offset = u64::MAX - 0xfff,
            |s| s.extents[1].len = 0x1001,
            |s| s.extents = vec![s.extents[0]; MAX_EXTENTS + 1],
            |s| s.processors.clear(),
            |s| s.made_for.size.vcpus = 2,
            |s| s.processors[0].msrs = vec![(0, 0); MAX_MSRS + 1],
            |s| s.processors[0].cpuid = vec![s.processors[0].cpuid[0]; MAX_CPUID + 1],
        ];
        for (number, change) in changes.into_iter().enumerate() {
            assert!(parse(change).is_err(), "{number}");
        }
        let json = serde_json::to_string(&state()).unwrap();
        let unknown = json.replacen('{', "{\"more\":1,", 1);
        assert!(State::parse(&file(unknown.as_bytes())).is_err());
        let deep = "[".repeat(100_000);
        assert!(State::parse(&file(deep.as_bytes())).is_err());
    }
}
