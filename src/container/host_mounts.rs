//! Mounts of config.json that are about the host's file systems: what engines write
//! for containers that share the host's kernel becomes what a virtual machine can
//! have. They are changed in the bundle before anything looks at it.
//!
//! ```text
//!  an overlay of directories of the host   is mounted on the host and bound
//!  cgroups of the host below /sys/fs/cgroup   are left out: the guest has its own
//! ```

use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde::Deserialize;
use serde_json::{Value, json};

use super::bundle::Bundle;
use super::{Error, context};

/// Where overlays are mounted, in a mount namespace of this process: a directory
/// that every host has and no bundle refers to.
const OVERLAYS: &str = "/proc/fs";

/// Where containers have their cgroups.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Rewrites the bundle's mounts. Where there are overlays, this process is in a mount
/// namespace of its own afterwards, which still receives the host's mounts.
///
/// # Errors
/// As unshare(2) and mount(2), with the destination of the mount.
pub fn prepare(bundle: &mut Bundle) -> Result<(), Error> {
    let overlays = take_overlays(&mut bundle.json);
    let cgroups = leave_out_cgroups(&mut bundle.json);
    if overlays.is_empty() && !cgroups {
        return Ok(());
    }
    if !overlays.is_empty() {
        enter_namespace().map_err(context("a mount namespace for overlays"))?;
    }
    for overlay in &overlays {
        overlay.mount().map_err(context(format!(
            "mounting the overlay for {}",
            overlay.destination
        )))?;
    }
    bundle.spec = oci_spec::runtime::Spec::deserialize(&bundle.json).map_err(|e| {
        // It was read before, and what has been written into it is valid.
        Error::Unsupported(format!("config.json: {e}"))
    })?;
    Ok(())
}

/// An overlay that is to be mounted on the host.
#[derive(Debug, PartialEq, Eq)]
struct Overlay {
    /// In the container, for messages.
    destination: String,
    place: PathBuf,
    /// Options of the file system (`lowerdir=...`), as mount(2) takes them.
    data: String,
}

impl Overlay {
    fn mount(&self) -> io::Result<()> {
        std::fs::create_dir(&self.place)?;
        let data = Some(self.data.as_str());
        mount(
            Some("overlay"),
            &self.place,
            Some("overlay"),
            MsFlags::empty(),
            data,
        )?;
        Ok(())
    }
}

/// Turns overlays with directories into bind mounts of where they are going to be.
/// runc resolves their paths on the host, so an overlay without paths is no business
/// of the host.
fn take_overlays(config: &mut Value) -> Vec<Overlay> {
    let mut overlays = Vec::new();
    for mount in config["mounts"].as_array_mut().into_iter().flatten() {
        let is_overlay = mount["type"] == "overlay";
        let options = mount["options"].as_array().cloned().unwrap_or_default();
        let (data, mut flags): (Vec<Value>, Vec<Value>) = options
            .into_iter()
            .partition(|option| option.as_str().is_some_and(is_of_overlay));
        if !is_overlay || data.is_empty() {
            continue;
        }
        let place = Path::new(OVERLAYS).join(overlays.len().to_string());
        flags.insert(0, json!("bind"));
        mount["type"] = json!("bind");
        mount["source"] = json!(place);
        mount["options"] = json!(flags);
        let data: Vec<&str> = data.iter().filter_map(Value::as_str).collect();
        overlays.push(Overlay {
            destination: mount["destination"].as_str().unwrap_or("?").to_owned(),
            place,
            data: data.join(","),
        });
    }
    overlays
}

/// Whether an option is for the file system, and not a flag of the mount
/// (Documentation/filesystems/overlayfs.rst).
fn is_of_overlay(option: &str) -> bool {
    matches!(option, "volatile" | "userxattr")
        || option
            .split_once('=')
            .is_some_and(|(key, _)| !key.is_empty())
}

fn enter_namespace() -> io::Result<()> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    mount(
        Some("tmpfs"),
        OVERLAYS,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0700,size=64k"),
    )?;
    Ok(())
}

/// Leaves bind mounts of the host's cgroups out and says whether there were any.
///
/// With cgroups of version 1 engines bind the hierarchy of systemd into containers
/// that run systemd (`podman run --systemd`). In the guest there is version 2 only, so
/// that what they are meant for is a writable cgroup2 of the container's own.
fn leave_out_cgroups(config: &mut Value) -> bool {
    let Some(mounts) = config["mounts"].as_array_mut() else {
        return false;
    };
    let before = mounts.len();
    mounts.retain(|mount| !is_cgroup_bind(mount));
    if mounts.len() == before {
        return false;
    }
    for mount in mounts.iter_mut().filter(|m| m["destination"] == CGROUPS) {
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|option| option != "ro");
        }
    }
    if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut()
        && !namespaces.iter().any(|n| n["type"] == "cgroup")
    {
        namespaces.push(json!({"type": "cgroup"}));
    }
    true
}

fn is_cgroup_bind(mount: &Value) -> bool {
    let below = |field: &str| {
        mount[field]
            .as_str()
            .is_some_and(|path| Path::new(path).starts_with(CGROUPS) && path != CGROUPS)
    };
    mount["type"] == "bind" && below("destination") && below("source")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_of_directories_becomes_a_bind_mount() {
        let mut config = json!({"mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/v", "type": "overlay", "source": "/merge",
             "options": ["lowerdir=/a:/b", "nosuid", "upperdir=/u", "workdir=/w", "volatile"]},
            {"destination": "/inside", "type": "overlay", "source": "overlay"},
        ]});
        let overlays = take_overlays(&mut config);
        let [overlay] = overlays.as_slice() else {
            panic!("{overlays:?}")
        };
        assert_eq!(
            overlay.data,
            "lowerdir=/a:/b,upperdir=/u,workdir=/w,volatile"
        );
        assert_eq!(
            config["mounts"][1],
            json!({"destination": "/v", "type": "bind", "source": "/proc/fs/0", "options": ["bind", "nosuid"]})
        );
        assert_eq!(config["mounts"][2]["type"], "overlay");
    }

    #[test]
    fn cgroups_of_the_host_are_left_out_and_the_containers_own_is_writable() {
        let mut config = json!({
            "mounts": [
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "ro"]},
                {"destination": "/sys/fs/cgroup/systemd", "type": "bind", "source": "/sys/fs/cgroup/systemd/x"},
                {"destination": "/v", "type": "bind", "source": "/sys/fs/cgroup/systemd"},
            ],
            "linux": {"namespaces": [{"type": "mount"}]},
        });
        assert!(leave_out_cgroups(&mut config));
        assert_eq!(config["mounts"].as_array().unwrap().len(), 2);
        assert_eq!(config["mounts"][0]["options"], json!(["nosuid"]));
        assert_eq!(
            config["linux"]["namespaces"],
            json!([{"type": "mount"}, {"type": "cgroup"}])
        );
        let once = config.clone();
        assert!(!leave_out_cgroups(&mut config));
        assert_eq!(config, once);
    }
}
