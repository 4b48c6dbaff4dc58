//! A container's network on the host: which namespace it is in, the settings it gets
//! there, and when its interfaces become the VM's.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::Linux;

use super::state::ContainerRecord;
use super::{Error, context, served_cards};
use crate::sandbox::Sandbox;
use crate::sandbox::network::namespace;

/// A setting of the network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// As in config.json.
    pub key: String,
    pub value: String,
    /// It is of an interface, and the guest gets it with that.
    pub of_interface: bool,
}

impl Sysctl {
    /// The settings of config.json that are of the network.
    #[must_use]
    pub fn of(linux: &Linux) -> Vec<Sysctl> {
        let all = linux.sysctl().iter().flatten();
        let mut found: Vec<_> = all
            .filter(|(key, _)| key.starts_with("net.") || key.starts_with("net/"))
            .map(|(key, value)| Sysctl {
                key: key.clone(),
                value: value.clone(),
                of_interface: is_of_interface(key),
            })
            .collect();
        found.sort_by(|a, b| a.key.cmp(&b.key));
        found
    }

    /// Sets it in the network namespace of the calling thread.
    ///
    /// # Errors
    /// As write(2), of a setting that only this kernel can have.
    pub fn set(&self) -> io::Result<()> {
        let path = Path::new("/proc/sys").join(path_of(&self.key));
        match fs::write(&path, &self.value) {
            // What is not of an interface is the guest's kernel's to judge.
            Err(e) if self.of_interface => {
                Err(io::Error::new(e.kind(), format!("{}: {e}", path.display())))
            }
            _ => Ok(()),
        }
    }
}

/// sysctl.d(5): the first separator decides which one separates.
fn path_of(key: &str) -> String {
    match key.find(['.', '/']) {
        Some(at) if key[at..].starts_with('/') => key.to_owned(),
        _ => key
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
    }
}

/// Whether it is one of an interface that need not be there yet.
fn is_of_interface(key: &str) -> bool {
    let path = path_of(key);
    let parts: Vec<&str> = path.split('/').collect();
    matches!(parts[..], ["net", "ipv4" | "ipv6", "conf" | "neigh", name, _]
        if !matches!(name, "all" | "default" | "lo"))
}

/// Makes the interfaces in the container's namespace, and those that appear there
/// later, network cards of its VM.
///
/// # Errors
/// See [`Error`].
pub fn connect(sandbox: &Sandbox, record: &ContainerRecord) -> Result<(), Error> {
    if !record.has_network {
        return Ok(());
    }
    let namespace = of_standin(record).map_err(context("the container's network namespace"))?;
    let cards = served_cards::connect(&record.served_cards)?;
    sandbox.connect_network(&record.id, namespace.as_fd(), &cards)?;
    Ok(())
}

pub(super) fn of_standin(record: &ContainerRecord) -> io::Result<OwnedFd> {
    let standin = record.standin.ok_or(io::ErrorKind::NotFound)?;
    let namespace = File::open(format!("/proc/{}/ns/net", standin.pid))?;
    // Asked afterwards, so that it cannot be another process's.
    if !standin.is_alive() {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(namespace.into())
}

/// Takes out of a namespace that outlives the VM what that has left.
pub fn clean(record: &ContainerRecord) {
    let Some(path) = &record.network_path else {
        return;
    };
    let cleaned = namespace::open(path)
        .map_err(io::Error::other)
        .and_then(|namespace| namespace::clean(namespace, &record.sandbox_id));
    // It is the engine's, which may have removed it.
    if let Err(e) = cleaned {
        log::debug!("cleaning {}: {e}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_paths() {
        for (key, path) in [
            ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
            (
                "net/ipv4/conf/eth0.100/rp_filter",
                "net/ipv4/conf/eth0.100/rp_filter",
            ),
            (
                "net.ipv4.conf.eth0/100.rp_filter",
                "net/ipv4/conf/eth0.100/rp_filter",
            ),
        ] {
            assert_eq!(path_of(key), path);
        }
    }

    #[test]
    fn settings_of_interfaces_are_told_from_the_others() {
        for key in [
            "net.ipv4.conf.eth0.rp_filter",
            "net.ipv6.neigh.eth1.gc_stale_time",
        ] {
            assert!(is_of_interface(key), "{key}");
        }
        for key in [
            "net.ipv4.ip_forward",
            "net.ipv4.conf.all.rp_filter",
            "net.ipv6.conf.lo.disable_ipv6",
            "net.core.somaxconn",
        ] {
            assert!(!is_of_interface(key), "{key}");
        }
    }
}
