//! `linux.netDevices`: interfaces of the host that are given to the container.
//!
//! They are moved from the network namespace of the caller to the container's, and
//! keep their permanent addresses that reach beyond the link (config-linux.md, network
//! devices). From there they come into the VM like all others. When the namespace
//! ends, the kernel removes virtual interfaces and returns hardware to the host.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use kuasar_runv_protocol::rtnetlink::Rtnetlink;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use oci_spec::runtime::Spec;

use super::network;
use super::state::ContainerRecord;
use crate::sandbox::network::namespace;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("network device {0} not found")]
    NotFound(String),
    #[error("the loopback interface cannot be moved to a container")]
    Loopback,
    #[error("moving the network device {name} to the container: {source}")]
    Io { name: String, source: io::Error },
}

/// An interface that is to be moved.
#[derive(Clone, Debug)]
struct Device {
    name: String,
    /// In the container.
    target: String,
    index: u32,
    up: bool,
    addresses: Vec<AddressMessage>,
}

/// Whether there are devices to give.
#[must_use]
pub fn are_wanted(spec: &Spec) -> bool {
    let linux = spec.linux().as_ref();
    linux
        .and_then(|linux| linux.net_devices().as_ref())
        .is_some_and(|devices| !devices.is_empty())
}

/// Gives the container its devices, all or none.
///
/// # Errors
/// See [`Error`].
pub fn give(spec: &Spec, record: &ContainerRecord) -> Result<(), Error> {
    let linux = spec.linux().as_ref();
    let wanted = linux.and_then(|linux| linux.net_devices().as_ref());
    let mut given: Vec<Device> = Vec::new();
    for (name, device) in wanted.into_iter().flatten() {
        let target = device.name().as_deref().filter(|n| !n.is_empty());
        let failed = |source| Error::Io {
            name: name.clone(),
            source,
        };
        let moved = find(name, target.unwrap_or(name)).and_then(|device| {
            let to = network::of_standin(record).map_err(failed)?;
            send(&device, &device.target, &to).map_err(failed)?;
            let inside = device.clone();
            let set_up = namespace::run_in(to, move || set_up(&inside));
            if set_up.is_err() {
                take_back(record, &device);
            }
            set_up.map_err(failed)?;
            Ok(device)
        });
        match moved {
            Ok(device) => given.push(device),
            Err(e) => {
                for device in &given {
                    take_back(record, device);
                }
                return Err(e);
            }
        }
    }
    Ok(())
}

/// Reads what there is to know about an interface of the calling thread's namespace.
fn find(name: &str, target: &str) -> Result<Device, Error> {
    let failed = |source| Error::Io {
        name: name.to_owned(),
        source,
    };
    let mut netlink = Rtnetlink::new().map_err(failed)?;
    let get = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let links = netlink.dump(get).map_err(failed)?;
    let wanted = LinkAttribute::IfName(name.to_owned());
    let link = links
        .into_iter()
        .find_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) if link.attributes.contains(&wanted) => Some(link),
            _ => None,
        })
        .ok_or_else(|| Error::NotFound(name.to_owned()))?;
    let flags = link.header.flags;
    if flags.contains(LinkFlags::Loopback) {
        return Err(Error::Loopback);
    }
    let get = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let addresses = netlink.dump(get).map_err(failed)?;
    Ok(Device {
        name: name.to_owned(),
        target: target.to_owned(),
        index: link.header.index,
        up: flags.contains(LinkFlags::Up),
        addresses: addresses
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewAddress(address) => kept(address, link.header.index),
                _ => None,
            })
            .collect(),
    })
}

/// An address that goes along, as it is to be added again.
fn kept(mut address: AddressMessage, index: u32) -> Option<AddressMessage> {
    let flags = address.attributes.iter().find_map(|a| match a {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    let is_permanent = flags.is_some_and(|flags| flags.contains(AddressFlags::Permanent))
        || address.header.flags.contains(AddressHeaderFlags::Permanent);
    let is_wanted = address.header.index == index
        && address.header.scope == AddressScope::Universe
        && is_permanent;
    address.attributes.retain(|attribute| {
        matches!(
            attribute,
            AddressAttribute::Address(_)
                | AddressAttribute::Local(_)
                | AddressAttribute::Broadcast(_)
        )
    });
    address.header.flags = AddressHeaderFlags::Nodad;
    is_wanted.then_some(address)
}

/// Moves an interface of the calling thread's namespace to another one.
fn send(device: &Device, name: &str, to: &OwnedFd) -> io::Result<()> {
    let mut netlink = Rtnetlink::new()?;
    let mut link = LinkMessage::default();
    link.header.index = device.index;
    link.header.change_mask = LinkFlags::Up;
    netlink.request(RouteNetlinkMessage::SetLink(link.clone()), 0)?;
    link.header.change_mask = LinkFlags::empty();
    link.attributes = vec![
        LinkAttribute::NetNsFd(to.as_raw_fd()),
        LinkAttribute::IfName(name.to_owned()),
    ];
    netlink.request(RouteNetlinkMessage::SetLink(link), 0)
}

/// In the container's namespace: addresses, and up (the specification says so,
/// whatever it was before).
fn set_up(device: &Device) -> io::Result<()> {
    let mut netlink = Rtnetlink::new()?;
    let index = nix::net::if_::if_nametoindex(device.target.as_str())?;
    for address in &device.addresses {
        let mut address = address.clone();
        address.header.index = index;
        let add = RouteNetlinkMessage::NewAddress(address);
        netlink.request(add, NLM_F_CREATE | NLM_F_REPLACE)?;
    }
    crate::sandbox::network::tap::set_up(&mut netlink, index)
}

/// Returns an interface to the caller's namespace. What fails is logged: there is
/// another error to report.
fn take_back(record: &ContainerRecord, device: &Device) {
    let back = || -> io::Result<()> {
        let home: OwnedFd = std::fs::File::open("/proc/thread-self/ns/net")?.into();
        let from = network::of_standin(record)?;
        let inside = device.clone();
        namespace::run_in(from, move || {
            let index = nix::net::if_::if_nametoindex(inside.target.as_str())?;
            let device = Device { index, ..inside };
            send(&device, &device.name, &home)
        })?;
        let restored = Device {
            target: device.name.clone(),
            ..device.clone()
        };
        if device.up {
            set_up(&restored)?;
        }
        Ok(())
    };
    if let Err(e) = back() {
        log::warn!("returning the network device {}: {e}", device.name);
    }
}
