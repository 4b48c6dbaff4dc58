//! Volumes that live in the guest: disks of the host, and huge pages.
//!
//! What they need of config.json is taken from it before anything is made
//! ([`disk`], [`huge_pages`]); when the virtual machine runs they are attached,
//! and what the guest says about them (where, which device number) is filled into
//! the guest's config.json.

pub mod disk;
pub mod huge_pages;

use std::os::fd::AsFd;

use kuasar_runv_protocol::storage::{AddVolumeRequest, AddVolumeResponse, add_volume_request};
use serde_json::{Value, json};

use super::Error;
use super::guest_spec::Error as SpecError;
use super::state::ContainerRecord;
use crate::agent_client::Agent;
use crate::root::Root;
use crate::sandbox::Sandbox;
use crate::sandbox::control::DiskMode;
use disk::Disk;
use huge_pages::HugePages;

/// Where in config.json what the guest says is to be filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// `mounts[]`
    Mount(usize),
    /// `linux.devices[]`
    Device(usize),
}

/// A use of a volume.
#[derive(Debug)]
pub struct GuestVolume {
    pub place: Place,
    pub kind: Kind,
}

#[derive(Debug)]
pub enum Kind {
    Disk(Disk),
    HugePages(HugePages),
}

impl GuestVolume {
    /// Attaches it, or finds that it is attached, and has the guest make it.
    fn make(&self, sandbox: &Sandbox, agent: &Agent, id: &str) -> Result<AddVolumeResponse, Error> {
        let (name, kind) = match &self.kind {
            Kind::Disk(disk) => {
                let name = attach(disk, sandbox, id)?;
                (name, add_volume_request::Kind::Disk(disk.request()))
            }
            Kind::HugePages(pages) => {
                let name = sandbox.use_volume(id, &pages.key)?;
                (name, add_volume_request::Kind::HugePages(pages.request()))
            }
        };
        let request = AddVolumeRequest {
            name,
            kind: Some(kind),
            ..AddVolumeRequest::new()
        };
        agent.add_volume(&request).map_err(|e| match &self.kind {
            Kind::Disk(disk) => about(disk, e.into()),
            Kind::HugePages(_) => Error::Agent(e),
        })
    }
}

/// Has the sandboxer attach a disk, unless it has; returns its name in the guest.
fn attach(disk: &Disk, sandbox: &Sandbox, id: &str) -> Result<String, Error> {
    let mode = DiskMode {
        file_system: disk.file_system.as_ref().map(|fs| fs.kind.clone()),
        read_only: disk.read_only,
        is_device: disk.number.is_some(),
    };
    let use_it = |file| {
        sandbox
            .use_disk(id, &disk.key(), &mode, file)
            .map_err(|e| about(disk, e))
    };
    if let Some(name) = use_it(None)? {
        return Ok(name);
    }
    // It is nobody's: opening it anew would fail if it were this pod's.
    let file = disk.open()?;
    let nameless = || crate::sandbox::Error::Refused("the sandboxer did not attach it".into());
    use_it(Some(file.as_fd()))?.ok_or_else(|| about(disk, nameless()))
}

fn about(disk: &Disk, error: crate::sandbox::Error) -> Error {
    Error::Volume {
        path: disk.source.clone(),
        source: Box::new(error),
    }
}

/// Makes the volumes of a container and completes its config.json.
///
/// # Errors
/// See [`Error`]. What has been made until then goes with [`release`].
pub fn make(
    sandbox: &Sandbox,
    agent: &Agent,
    id: &str,
    volumes: &[GuestVolume],
    config: &mut Value,
) -> Result<(), Error> {
    let mut numbers = Vec::new();
    for volume in volumes {
        let made = volume.make(sandbox, agent, id)?;
        match volume.place {
            Place::Mount(index) => config["mounts"][index]["source"] = json!(made.path),
            Place::Device(index) => {
                let device = &mut config["linux"]["devices"][index];
                device["major"] = json!(made.major);
                device["minor"] = json!(made.minor);
            }
        }
        if let Kind::Disk(Disk {
            number: Some(number),
            ..
        }) = volume.kind
        {
            numbers.push((number, (made.major, made.minor)));
        }
    }
    translate_rules(config, &numbers);
    Ok(())
}

/// Rules about devices of the host become rules about those of the guest.
fn translate_rules(config: &mut Value, numbers: &[((u32, u32), (u32, u32))]) {
    let rules = config["linux"]["resources"]["devices"].as_array_mut();
    for rule in rules.into_iter().flatten() {
        let number = |key: &str| rule[key].as_u64().and_then(|n| u32::try_from(n).ok());
        let (Some(major), Some(minor)) = (number("major"), number("minor")) else {
            continue;
        };
        let of = |(host, _): &&((u32, u32), (u32, u32))| *host == (major, minor);
        if rule["type"] == "b"
            && let Some((_, (major, minor))) = numbers.iter().find(of)
        {
            rule["major"] = json!(major);
            rule["minor"] = json!(minor);
        }
    }
}

/// Ends a container's use of everything that the pod shares. Its processes have
/// ended. What fails is logged and stays until the virtual machine ends.
pub fn release(root: &Root, record: &ContainerRecord) {
    if let Err(e) = try_release(root, record) {
        log::warn!("volumes of {}: {e}", record.id);
    }
}

fn try_release(root: &Root, record: &ContainerRecord) -> Result<(), Error> {
    let sandbox = Sandbox::open(root, &record.sandbox_id)?;
    let unused = sandbox.unshare(&record.id)?;
    let agent = sandbox.agent()?;
    if !unused.paths.is_empty() {
        agent.forget(&unused.paths).map_err(Error::Agent)?;
    }
    for name in unused.volumes {
        // A disk that the guest does not let go of must not be taken away from it.
        agent.remove_volume(&name).map_err(Error::Agent)?;
        sandbox.remove_volume(&name)?;
    }
    Ok(())
}

/// Errors of files are about the path.
fn at(path: &std::path::Path) -> impl Fn(std::io::Error) -> SpecError {
    move |source| SpecError::Volume {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_follow_the_devices_they_are_about() {
        let rule = |typ: &str, major: u32, minor: u32| json!({"allow": true, "type": typ, "major": major, "minor": minor, "access": "rw"});
        let mut config = json!({"linux": {"resources": {"devices": [
            {"allow": false, "access": "rwm"},
            rule("b", 8, 1), rule("b", 8, 2), rule("c", 8, 1), rule("b", 254, 0),
        ]}}});
        // The second is what the first becomes.
        translate_rules(&mut config, &[((8, 1), (254, 0)), ((254, 0), (254, 1))]);
        assert_eq!(
            config["linux"]["resources"]["devices"],
            json!([
                {"allow": false, "access": "rwm"},
                rule("b", 254, 0), rule("b", 8, 2), rule("c", 8, 1), rule("b", 254, 1),
            ])
        );
    }
}
