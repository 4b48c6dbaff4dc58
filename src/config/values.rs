//! Values of configuration keys, checked while they are deserialized so that the
//! parser knows the line of a wrong one.

use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::{HugePages, Hypervisor};

const AVAILABLE_HYPERVISORS: &str = "\"auto\", \"builtin\", \"qemu\"";
/// Hypervisors that other versions of this program have.
const OTHER_HYPERVISORS: [&str; 3] = ["cloud-hypervisor", "stratovirt", "firecracker"];

impl<'de> Deserialize<'de> for Hypervisor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        match name.as_str() {
            "auto" => Ok(Hypervisor::Auto),
            "builtin" => Ok(Hypervisor::Builtin),
            "qemu" => Ok(Hypervisor::Qemu),
            other if OTHER_HYPERVISORS.contains(&other) => Err(D::Error::custom(format!(
                "\"{other}\" is not built into this version, it has {AVAILABLE_HYPERVISORS}"
            ))),
            other => Err(D::Error::custom(format!(
                "no hypervisor is called \"{other}\", there are {AVAILABLE_HYPERVISORS}"
            ))),
        }
    }
}

/// Absolute paths without `.` and `..`.
pub fn directories<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    let paths = Vec::<PathBuf>::deserialize(deserializer)?;
    let is_plain = |path: &PathBuf| {
        let mut parts = path.components();
        parts.next() == Some(Component::RootDir)
            && parts.all(|part| matches!(part, Component::Normal(_)))
    };
    match paths.iter().find(|path| !is_plain(path)) {
        Some(path) => Err(D::Error::custom(format!(
            "\"{}\" must be an absolute path without \"..\"",
            path.display()
        ))),
        None => Ok(paths),
    }
}

/// `false`, or a kind of huge pages.
#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Pages {
    Switch(bool),
    Kind(String),
}

impl<'de> Deserialize<'de> for HugePages {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let none = || D::Error::custom("must be false, \"2M\", \"1G\" or \"thp\"");
        match Pages::deserialize(deserializer).map_err(|_| none())? {
            Pages::Switch(false) => Ok(HugePages::Off),
            Pages::Kind(kind) => match kind.as_str() {
                "2M" => Ok(HugePages::Mib2),
                "1G" => Ok(HugePages::Gib1),
                "thp" => Ok(HugePages::Transparent),
                _ => Err(none()),
            },
            Pages::Switch(true) => Err(none()),
        }
    }
}

impl Serialize for HugePages {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let kind = |name: &str| Pages::Kind(name.to_owned());
        match self {
            HugePages::Off => Pages::Switch(false),
            HugePages::Mib2 => kind("2M"),
            HugePages::Gib1 => kind("1G"),
            HugePages::Transparent => kind("thp"),
        }
        .serialize(serializer)
    }
}

pub(super) fn absolute_path<'de, D: Deserializer<'de>>(d: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(d)?;
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(D::Error::custom(format!(
            "must be an absolute path, not \"{}\"",
            path.display()
        )))
    }
}

pub(super) fn one_line<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    let text = String::deserialize(d)?;
    if text.chars().any(char::is_control) {
        Err(D::Error::custom(
            "must be one line without control characters",
        ))
    } else {
        Ok(text)
    }
}

fn number<'de, D: Deserializer<'de>>(d: D, range: RangeInclusive<u32>) -> Result<u32, D::Error> {
    let value = i64::deserialize(d)?;
    match u32::try_from(value) {
        Ok(value) if range.contains(&value) => Ok(value),
        _ => Err(D::Error::custom(format!(
            "must be between {} and {}, not {value}",
            range.start(),
            range.end()
        ))),
    }
}

pub(super) fn vcpus<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    // An APIC id is 8 bits wide without an IOMMU, and 255 means all of them.
    number(d, 1..=255)
}

pub(super) fn queues<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    number(d, 0..=16)
}

pub(super) fn memory_mib<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    number(d, 128..=4 << 20)
}

pub(super) fn vcpus_or_zero<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    number(d, 0..=255)
}

pub(super) fn memory_mib_or_zero<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    match number(d, 0..=4 << 20)? {
        small @ 1..128 => Err(D::Error::custom(format!(
            "must be 0 or between 128 and 4194304, not {small}"
        ))),
        value => Ok(value),
    }
}

pub(super) fn overhead_mib<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    number(d, 0..=65_536)
}

pub(super) fn seconds<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    number(d, 1..=86_400)
}

pub(super) fn seconds_or_zero<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    number(d, 0..=86_400)
}

/// Where the guest's kernel and image are installed: `../lib/kuasar-runv` of the
/// directory the running binary is in, or the usual prefixes.
pub(super) fn guest_dir() -> PathBuf {
    let beside_binary = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.parent()?.join("lib/kuasar-runv")));
    first_guest_dir(beside_binary)
}

fn first_guest_dir(beside_binary: Option<PathBuf>) -> PathBuf {
    let installed = Path::new("/usr/lib/kuasar-runv");
    beside_binary
        .into_iter()
        .chain([installed.into(), "/usr/local/lib/kuasar-runv".into()])
        .find(|dir| dir.join("vmlinux").exists())
        .unwrap_or_else(|| installed.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_looked_for_beside_the_binary_first() {
        let prefix = tempfile::tempdir().unwrap();
        let dir = prefix.path().join("lib/kuasar-runv");
        assert_ne!(first_guest_dir(Some(dir.clone())), dir);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("vmlinux"), "").unwrap();
        assert_eq!(first_guest_dir(Some(dir.clone())), dir);
    }
}
