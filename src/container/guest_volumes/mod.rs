//! Volumes that live in the guest: disks of the host, huge pages, and sockets that
//! stand for those of the host.
//!
//! What they need of config.json is taken from it before anything is made
//! ([`disk`], [`huge_pages`]); when the virtual machine runs they are attached,
//! and what the guest says about them (where, which device number) is filled into
//! the guest's config.json.

pub mod disk;
pub mod huge_pages;
pub mod socket;
pub(in crate::container) mod vhost_user;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use kuasar_runv_protocol::storage::{AddVolumeRequest, AddVolumeResponse, add_volume_request};
use serde_json::{Value, json};

use super::guest_spec::Error as SpecError;
use super::state::ContainerRecord;
use super::{Error, context, pod};
use crate::agent_client::Agent;
use crate::root::Root;
use crate::sandbox::control::{DiskMode, GuestDisk, Unused};
use crate::sandbox::{self, Sandbox};
use disk::Disk;
use huge_pages::HugePages;
use socket::Socket;

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
    Socket(Socket),
}

impl GuestVolume {
    /// Attaches it, or finds that it is attached, and has the guest make it.
    fn make(&self, sandbox: &Sandbox, agent: &Agent, id: &str) -> Result<AddVolumeResponse, Error> {
        let (name, kind) = match &self.kind {
            Kind::Disk(disk) => {
                let attached = attach(disk, sandbox, id)?;
                let request = disk.request(&attached.place);
                (attached.name, add_volume_request::Kind::Disk(request))
            }
            Kind::HugePages(pages) => {
                let name = sandbox.use_volume(id, &pages.key)?;
                (name, add_volume_request::Kind::HugePages(pages.request()))
            }
            Kind::Socket(socket) => {
                let file = socket.file.as_fd();
                let (name, token) = sandbox
                    .use_socket(id, &socket.key(), &socket.identities, file)
                    .map_err(|e| about(&socket.source, e))?;
                (
                    name,
                    add_volume_request::Kind::Socket(socket.request(token)),
                )
            }
        };
        let request = AddVolumeRequest {
            name,
            kind: Some(kind),
            ..AddVolumeRequest::new()
        };
        agent.add_volume(&request).map_err(|e| match &self.kind {
            Kind::Disk(disk) => about(&disk.source, e.into()),
            Kind::Socket(socket) => about(&socket.source, e.into()),
            Kind::HugePages(_) => Error::Agent(e),
        })
    }
}

/// Has the sandboxer attach a disk, unless it has; returns what it is in the guest.
fn attach(disk: &Disk, sandbox: &Sandbox, id: &str) -> Result<GuestDisk, Error> {
    let mode = DiskMode {
        file_system: disk.file_system.as_ref().map(|fs| fs.kind.clone()),
        read_only: disk.read_only,
        source: disk.kind,
    };
    let use_it = |file| {
        sandbox
            .use_disk(id, &disk.key(), &mode, file)
            .map_err(|e| about(&disk.source, e))
    };
    if let Some(attached) = use_it(None)? {
        return Ok(attached);
    }
    // It is nobody's: opening it anew would fail if it were this pod's.
    let file = disk.open()?;
    let nameless = || crate::sandbox::Error::Refused("the sandboxer did not attach it".into());
    use_it(Some(file.as_fd()))?.ok_or_else(|| about(&disk.source, nameless()))
}

fn about(source: &Path, error: crate::sandbox::Error) -> Error {
    Error::Volume {
        path: source.to_owned(),
        source: Box::new(error),
    }
}

/// Makes the volumes of a container and completes its config.json.
///
/// # Errors
/// See [`Error`]. What has been made until then is the container's, and goes with it.
pub fn make(
    sandbox: &Sandbox,
    id: &str,
    volumes: &[GuestVolume],
    config: &mut Value,
) -> Result<(), Error> {
    let agent = sandbox.agent()?;
    let (mut numbers, mut allowed) = (Vec::new(), Vec::new());
    for volume in volumes {
        let made = volume.make(sandbox, &agent, id)?;
        match volume.place {
            Place::Mount(index) => config["mounts"][index]["source"] = json!(made.path),
            Place::Device(index) => {
                let device = &mut config["linux"]["devices"][index];
                device["major"] = json!(made.major);
                device["minor"] = json!(made.minor);
            }
        }
        if let Kind::Disk(disk) = &volume.kind {
            let there = (made.major, made.minor);
            numbers.extend(disk.number.map(|here| (here, there)));
            allowed.extend(disk.is_unnumbered().then_some((there, disk.read_only)));
        }
    }
    translate_rules(config, &numbers);
    for (number, read_only) in allowed {
        allow(config, number, read_only);
    }
    Ok(())
}

/// Of a device: major and minor.
type Number = (u32, u32);

/// Rules about devices of the host become rules about those of the guest.
fn translate_rules(config: &mut Value, numbers: &[(Number, Number)]) {
    let rules = config["linux"]["resources"]["devices"].as_array_mut();
    for rule in rules.into_iter().flatten() {
        let number = |key: &str| rule[key].as_u64().and_then(|n| u32::try_from(n).ok());
        let (Some(major), Some(minor)) = (number("major"), number("minor")) else {
            continue;
        };
        let known = numbers.iter().find(|(host, _)| *host == (major, minor));
        if rule["type"] == "b"
            && let Some((_, (major, minor))) = known
        {
            rule["major"] = json!(major);
            rule["minor"] = json!(minor);
        }
    }
}

/// Lets the container use a device that no rule of its own can be about.
fn allow(config: &mut Value, (major, minor): Number, read_only: bool) {
    let rules = &mut config["linux"]["resources"]["devices"];
    if !rules.is_array() {
        *rules = json!([]);
    }
    if let Some(rules) = rules.as_array_mut() {
        let access = if read_only { "r" } else { "rw" };
        rules.push(json!({
            "allow": true, "type": "b", "major": major, "minor": minor, "access": access,
        }));
    }
}

/// Takes apart what nobody uses any more; its containers are gone from the guest.
///
/// # Errors
/// See [`Error`]. What is left is taken apart the next time, or ends with the
/// machine.
pub fn take_apart(sandbox: &Sandbox, unused: &Unused) -> Result<(), Error> {
    if unused.paths.is_empty() && unused.volumes.is_empty() {
        return Ok(());
    }
    let agent = sandbox.agent()?;
    agent.forget(&unused.paths).map_err(Error::Agent)?;
    for name in &unused.volumes {
        // A disk that the guest does not let go of must not be taken away from it.
        agent.remove_volume(name).map_err(Error::Agent)?;
        sandbox.remove_volume(name)?;
    }
    Ok(())
}

/// Name of the file in a sandbox's directory that is there if there may be volumes to
/// be written back.
const MARK: &str = "guest-volumes";

/// Notes that the pod has volumes in the guest, before there are any.
///
/// # Errors
/// As open(2).
pub fn note(root: &Root, sandbox_id: &str) -> io::Result<()> {
    fs::write(root.sandbox(sandbox_id).join(MARK), "")
}

/// Has the guest write back what it has of the pod's disks, because its machine is
/// about to end. The containers in it end first. What fails is logged. A machine that
/// has ended by itself, or is of a `create` that is given up, has nothing any more.
pub fn write_back(root: &Root, sandbox_id: &str) {
    if !root.sandbox(sandbox_id).join(MARK).exists() {
        return;
    }
    let written = Sandbox::open(root, sandbox_id)
        .map_err(Error::Sandbox)
        .and_then(|sandbox| write_back_all(root, &sandbox, sandbox_id));
    match written {
        Ok(()) => {}
        Err(e @ Error::Sandbox(sandbox::Error::Gone(_))) => {
            log::debug!("the disks of {sandbox_id}: {e}");
        }
        Err(e) => log::warn!("writing the disks of {sandbox_id} back: {e}"),
    }
}

fn write_back_all(root: &Root, sandbox: &Sandbox, sandbox_id: &str) -> Result<(), Error> {
    let containers = fs::read_dir(root.containers()).map_err(context("reading the containers"))?;
    for entry in containers.flatten() {
        let id = entry.file_name();
        let Some(id) = id.to_str() else { continue };
        let record = ContainerRecord::read(root, id);
        if record.is_ok_and(|record| record.sandbox_id == sandbox_id) {
            let unused = sandbox.unshare(id)?;
            pod::remove_from_guest(sandbox, id)?;
            take_apart(sandbox, &unused)?;
        }
    }
    Ok(())
}

/// Errors of files are about the path.
fn at(path: &Path) -> impl Fn(std::io::Error) -> SpecError {
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
        allow(&mut config, (254, 2), false);
        let rules = &config["linux"]["resources"]["devices"];
        assert_eq!(rules[5], rule("b", 254, 2));
        let mut empty = json!({});
        allow(&mut empty, (254, 2), true);
        let rules = &empty["linux"]["resources"]["devices"];
        assert_eq!(rules[0]["access"], "r");
    }
}
