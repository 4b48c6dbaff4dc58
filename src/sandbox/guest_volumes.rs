//! Which volumes the pod has in the guest, and who uses them: disks that are
//! attached to the virtual machine, and what the guest makes by itself. The record
//! of the sandboxer; the guest is told by the commands.

use std::collections::BTreeMap;
use std::io;

use super::control::DiskMode;

/// A volume.
#[derive(Debug)]
struct Volume {
    /// What it is on the host.
    key: String,
    /// Of a disk.
    mode: Option<DiskMode>,
    /// Where it is plugged in.
    place: Option<String>,
    users: Vec<String>,
}

/// The volumes by the names they have in the guest.
#[derive(Debug, Default)]
pub struct GuestVolumes {
    volumes: BTreeMap<String, Volume>,
    made: u64,
}

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    Known(String),
    /// To be attached, and forgotten when that fails.
    New(String),
}

impl GuestVolumes {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.volumes.is_empty()
    }

    /// Adds a use of the volume `key`.
    ///
    /// # Errors
    /// It is there in another way.
    pub fn add(&mut self, key: &str, mode: Option<DiskMode>, container: &str) -> io::Result<Found> {
        let known = self.volumes.iter_mut().find(|(_, v)| v.key == key);
        if let Some((name, volume)) = known {
            if let Some(why) = conflict(volume.mode.as_ref(), mode.as_ref()) {
                return Err(io::Error::other(why));
            }
            volume.users.push(container.to_owned());
            return Ok(Found::Known(name.clone()));
        }
        self.made += 1;
        let kind = if mode.is_some() { "disk" } else { "volume" };
        let name = format!("{kind}-{}", self.made);
        let volume = Volume {
            key: key.to_owned(),
            mode,
            place: None,
            users: vec![container.to_owned()],
        };
        self.volumes.insert(name.clone(), volume);
        Ok(Found::New(name))
    }

    /// It is plugged in.
    pub fn place(&mut self, name: &str, place: String) {
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.place = Some(place);
        }
    }

    /// Where it is plugged in.
    pub fn place_of(&self, name: &str) -> Option<String> {
        self.volumes.get(name)?.place.clone()
    }

    /// Ends the uses of a container; returns the names of all that nobody uses,
    /// also of those that could not be removed earlier.
    pub fn release(&mut self, container: &str) -> Vec<String> {
        for volume in self.volumes.values_mut() {
            volume.users.retain(|user| user != container);
        }
        let unused = self.volumes.iter().filter(|(_, v)| v.users.is_empty());
        unused.map(|(name, _)| name.clone()).collect()
    }

    /// Whether `name` is a disk that nobody uses; anything else that nobody uses
    /// is forgotten.
    ///
    /// # Errors
    /// It is used.
    pub fn is_unused_disk(&mut self, name: &str) -> io::Result<bool> {
        match self.volumes.get(name) {
            None => Ok(false),
            Some(volume) if !volume.users.is_empty() => {
                Err(io::Error::other(format!("{name} is in use again")))
            }
            Some(volume) if volume.mode.is_some() => Ok(true),
            Some(_) => {
                self.forget(name);
                Ok(false)
            }
        }
    }

    /// It is no more.
    pub fn forget(&mut self, name: &str) {
        self.volumes.remove(name);
    }
}

/// Why a disk that is attached in one way cannot be used in another.
fn conflict(attached: Option<&DiskMode>, wanted: Option<&DiskMode>) -> Option<String> {
    let (attached, wanted) = (attached?, wanted?);
    if attached.file_system != wanted.file_system {
        let use_of = |mode: &DiskMode| match &mode.file_system {
            Some(kind) => format!("as {kind}"),
            None => "as a device".to_owned(),
        };
        return Some(format!(
            "another container of the pod uses it {}, it cannot be used {} at the same time",
            use_of(attached),
            use_of(wanted)
        ));
    }
    (attached.read_only && !wanted.read_only)
        .then(|| "another container of the pod has attached it read-only".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::control::DiskSource;
    use super::*;

    fn mode(file_system: Option<&str>, read_only: bool) -> Option<DiskMode> {
        Some(DiskMode {
            file_system: file_system.map(str::to_owned),
            read_only,
            source: DiskSource::Device,
        })
    }

    #[test]
    fn a_volume_lives_as_long_as_somebody_uses_it() {
        let mut volumes = GuestVolumes::default();
        let name = |n: &str| n.to_owned();
        let added = volumes.add("a", mode(Some("ext4"), false), "c1").unwrap();
        assert_eq!(added, Found::New(name("disk-1")));
        assert_eq!(volumes.place_of("disk-1"), None);
        volumes.place("disk-1", name("pci:07"));
        assert_eq!(volumes.place_of("disk-1"), Some(name("pci:07")));
        for (container, read_only) in [("c1", false), ("c2", true)] {
            let again = volumes.add("a", mode(Some("ext4"), read_only), container);
            assert_eq!(again.unwrap(), Found::Known(name("disk-1")));
        }
        let pages = volumes.add("pages", None, "c1").unwrap();
        assert_eq!(pages, Found::New(name("volume-2")));
        assert_eq!(volumes.release("c1"), ["volume-2"]);
        assert!(!volumes.is_unused_disk("volume-2").unwrap());
        assert!(volumes.is_unused_disk("disk-1").is_err());
        assert_eq!(volumes.release("c2"), ["disk-1"]);
        assert!(volumes.is_unused_disk("disk-1").unwrap());
        volumes.forget("disk-1");
        let added = volumes.add("a", mode(None, false), "c3").unwrap();
        assert_eq!(added, Found::New(name("disk-3")));
    }

    #[test]
    fn a_disk_is_used_in_one_way() {
        let mut volumes = GuestVolumes::default();
        volumes.add("a", mode(None, true), "c1").unwrap();
        for (wanted, words) in [
            (mode(None, false), "read-only"),
            (mode(Some("ext4"), true), "as a device"),
        ] {
            let message = volumes.add("a", wanted, "c2").unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
        assert_eq!(volumes.release("c1"), ["disk-1"]);
    }
}
