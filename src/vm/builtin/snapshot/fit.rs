//! What a template was made for. Only a machine that would be made the same way is made of it.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use super::Error;
use super::processor;
use crate::vm::builtin::{cpuid, most, setup};
use crate::vm::{VmConfig, VmSize};

/// Everything that decides what a machine is when it is booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MadeFor {
    pub runtime: Runtime,
    pub host: Host,
    pub kernel: FileId,
    pub image: FileId,
    /// The kernel's command line.
    pub parameters: String,
    pub size: VmSize,
    pub most: VmSize,
    pub fs_tag: String,
}

/// This program, whose devices the guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    pub version: String,
    pub file: FileId,
}

/// A file, told from others without reading it: who replaces or changes it changes this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileId {
    pub path: PathBuf,
    inode: u64,
    len: u64,
    /// Nanoseconds since 1970 of the last change of content and of anything.
    modified: i128,
    changed: i128,
}

/// What the guest's processors are made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    kernel: String,
    /// Vendor, family, model, stepping and microcode.
    processor: String,
    /// CRC-32 of the features that the first of one processor would have, and of the
    /// registers that KVM has.
    features: u32,
    registers: u32,
}

impl MadeFor {
    /// For a machine of this configuration on this host.
    ///
    /// # Errors
    /// A file that is not there; a question that KVM does not answer.
    pub fn now(config: &VmConfig) -> Result<MadeFor, Error> {
        let config = &VmConfig {
            most: most(config),
            ..config.clone()
        };
        Ok(MadeFor {
            runtime: Runtime::now()?,
            host: Host::now().map_err(Error::Host)?,
            kernel: FileId::of(&config.kernel)?,
            image: FileId::of(&config.initrd)?,
            parameters: setup::parameters(config),
            size: config.size,
            most: config.most,
            fs_tag: config.fs_tag.clone(),
        })
    }

    /// The name of its directory. What is in the directory has all of it, so that two of
    /// the same name are told from each other.
    pub fn key(&self) -> String {
        // A value of these types can always be written.
        let json = serde_json::to_vec(self).unwrap_or_default();
        format!("{:08x}", crc32fast::hash(&json))
    }

    /// What has changed since it was made, so that it can never be used again.
    pub fn stale(&self) -> Option<&'static str> {
        let changed = |file: &FileId| FileId::of(&file.path).ok().as_ref() != Some(file);
        if Runtime::now().ok().as_ref() != Some(&self.runtime) {
            Some("another version of kuasar-runv")
        } else if Host::now().ok().as_ref() != Some(&self.host) {
            Some("another host kernel or processor")
        } else if changed(&self.kernel) {
            Some("another guest kernel")
        } else if changed(&self.image) {
            Some("another guest image")
        } else {
            None
        }
    }

    #[cfg(any(test, fuzzing))]
    #[allow(clippy::unwrap_used)]
    pub fn of_test(size: VmSize) -> MadeFor {
        let file = FileId::of(Path::new("/proc/self/exe")).unwrap();
        MadeFor {
            runtime: Runtime::now().unwrap(),
            host: Host {
                kernel: "6.1".into(),
                processor: "x".into(),
                features: 1,
                registers: 2,
            },
            kernel: file.clone(),
            image: file,
            parameters: "quiet".into(),
            size,
            most: size,
            fs_tag: "tag".into(),
        }
    }
}

impl Runtime {
    fn now() -> Result<Runtime, Error> {
        Ok(Runtime {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            file: FileId::of(Path::new("/proc/self/exe"))?,
        })
    }
}

impl FileId {
    fn of(path: &Path) -> Result<FileId, Error> {
        let metadata = std::fs::metadata(path).map_err(Error::file(path))?;
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Ok(FileId {
            path: path.to_owned(),
            inode: metadata.ino(),
            len: metadata.len(),
            modified: ns(metadata.mtime(), metadata.mtime_nsec()),
            changed: ns(metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

impl Host {
    fn now() -> io::Result<Host> {
        let error = |e: kvm_ioctls::Error| io::Error::from_raw_os_error(e.errno());
        let kvm = Kvm::new().map_err(error)?;
        let mut features = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(error)?;
        // Without what depends on the processor that this happens to run on.
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        cpuid::adapt(&mut features, 0, 1, deadline);
        let mut sum = crc32fast::Hasher::new();
        for leaf in features.as_slice() {
            let words = [
                leaf.function,
                leaf.index,
                leaf.eax,
                leaf.ebx,
                leaf.ecx,
                leaf.edx,
            ];
            words
                .iter()
                .for_each(|word| sum.update(&word.to_le_bytes()));
        }
        let mut registers = crc32fast::Hasher::new();
        for number in processor::msrs(&kvm).map_err(io::Error::other)? {
            registers.update(&number.to_le_bytes());
        }
        Ok(Host {
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            processor: first_processor(&mut File::open("/proc/cpuinfo")?)?,
            features: sum.finalize(),
            registers: registers.finalize(),
        })
    }
}

/// The first of many descriptions; the file is made anew for each reader, as far as it
/// reads.
fn first_processor(cpuinfo: &mut impl Read) -> io::Result<String> {
    const NAMES: [&str; 5] = ["vendor_id", "cpu family", "model", "stepping", "microcode"];
    let mut text = vec![0; 2048];
    let len = cpuinfo.read(&mut text)?;
    let text = String::from_utf8_lossy(&text[..len]);
    let value = |name: &str| {
        let values = text.lines().filter_map(|line| line.split_once(':'));
        let value = values.into_iter().find(|(key, _)| key.trim() == name);
        value.map_or("?", |(_, value)| value.trim()).to_owned()
    };
    Ok(NAMES.map(value).join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_described_by_what_decides_its_behaviour() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n\
                    model name\t: Some Xeon\nstepping\t: 8\nmicrocode\t: 0x2b\ncpu MHz\t: 2000\n\n\
                    processor\t: 1\nvendor_id\t: other\n";
        let processor = first_processor(&mut text.as_bytes()).unwrap();
        assert_eq!(processor, "GenuineIntel 6 143 8 0x2b");
        assert_eq!(first_processor(&mut "".as_bytes()).unwrap(), "? ? ? ? ?");
    }

    #[test]
    fn a_file_that_was_replaced_or_changed_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        std::fs::write(&path, "one").unwrap();
        let one = FileId::of(&path).unwrap();
        assert_eq!(FileId::of(&path).unwrap(), one);
        let other = dir.path().join("other");
        std::fs::write(&other, "two").unwrap();
        std::fs::rename(&other, &path).unwrap();
        let two = FileId::of(&path).unwrap();
        assert_ne!(two, one);
        std::fs::write(&path, "longer").unwrap();
        assert_ne!(FileId::of(&path).unwrap(), two);
        std::fs::remove_file(&path).unwrap();
        assert!(FileId::of(&path).is_err());
    }

    #[test]
    fn everything_is_part_of_the_key() {
        let size = VmSize {
            vcpus: 1,
            memory_mib: 16,
        };
        let one = MadeFor::of_test(size);
        assert_eq!(one.key(), MadeFor::of_test(size).key());
        assert_eq!(one.key().len(), 8);
        let changes: [fn(&mut MadeFor); 6] = [
            |m| m.parameters.push(' '),
            |m| m.most.vcpus = 2,
            |m| m.host.features = 3,
            |m| m.kernel.len = 1,
            |m| m.runtime.version = "9".into(),
            |m| m.size.memory_mib = 17,
        ];
        for change in changes {
            let mut other = one.clone();
            change(&mut other);
            assert_ne!(other.key(), one.key());
            assert_ne!(other, one);
        }
    }

    #[test]
    fn a_template_of_another_host_or_of_files_that_are_gone_is_stale() {
        let size = VmSize {
            vcpus: 1,
            memory_mib: 16,
        };
        // No host is like that.
        let mut made_for = MadeFor::of_test(size);
        assert_eq!(made_for.stale(), Some("another host kernel or processor"));
        made_for.runtime.version = "0".into();
        assert_eq!(made_for.stale(), Some("another version of kuasar-runv"));
    }
}
