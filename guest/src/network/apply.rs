//! From what a container's network was to what it is to be.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use kuasar_runv_protocol::network::{ApplyRequest, Interface};
use kuasar_runv_protocol::rtnetlink::Rtnetlink;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Parseable};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressMessageBuffer};
use netlink_packet_route::neighbour::{NeighbourMessage, NeighbourMessageBuffer};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteMessageBuffer};
use netlink_packet_route::rule::{RuleMessage, RuleMessageBuffer};
use nix::sched::{CloneFlags, setns};

use super::{Applied, NetworkError, Result, links, settings};

/// The loopback interface's index in every network namespace.
const LOOPBACK: u32 = 1;

/// Makes the network in `namespace` what `request` says. The calling thread may be
/// left in any namespace.
pub fn apply(namespace: OwnedFd, applied: &mut Applied, request: ApplyRequest) -> Result<()> {
    let machine: OwnedFd = File::open("/proc/thread-self/ns/net")
        .map_err(NetworkError::io("opening the machine's network namespace"))?
        .into();
    let enter = |namespace: &OwnedFd| {
        setns(namespace, CloneFlags::CLONE_NEWNET)
            .map_err(NetworkError::io("entering a network namespace"))
    };
    let gone: Vec<_> = missing(&applied.request.interfaces, &request.interfaces);
    if !gone.is_empty() {
        enter(&namespace)?;
        retire(&gone, applied, &machine)?;
        enter(&machine)?;
        let macs: Vec<_> = gone.iter().map(|i| i.mac.clone()).collect();
        links::remove_retired(&macs).map_err(NetworkError::io("removing a device"))?;
    }
    let new = missing(&request.interfaces, &applied.request.interfaces);
    if !new.is_empty() {
        let borrowed: Vec<_> = new.iter().collect();
        let found = links::find_new(&borrowed)?;
        let mut netlink = socket()?;
        for (index, interface) in found.into_iter().zip(&new) {
            links::send(&mut netlink, index, namespace.as_fd(), &interface.name).map_err(
                NetworkError::io(format!("moving {} to the container", interface.name)),
            )?;
        }
    }
    enter(&namespace)?;
    let old = std::mem::take(&mut applied.request);
    let mut netlink = socket()?;
    for interface in &new {
        // It has got its name on the way.
        let index = nix::net::if_::if_nametoindex(interface.name.as_str())
            .map_err(NetworkError::io(format!("finding {}", interface.name)))?;
        applied.indices.insert(interface.device_mac.clone(), index);
        links::no_link_local(&mut netlink, index)
            .map_err(NetworkError::io(format!("preparing {}", interface.name)))?;
    }
    let result = set_up(&mut netlink, applied, &old, &request);
    applied.request = match result {
        Ok(()) => request,
        // Some of it may be there: the next call is to find out.
        Err(_) => union(old, request),
    };
    result
}

/// Lets go of the devices of a container whose network namespace has ended.
pub fn let_go(applied: &Applied) -> Result<()> {
    let interfaces = applied.request.interfaces.iter();
    let macs: Vec<_> = interfaces.map(|i| i.mac.clone()).collect();
    links::remove_retired(&macs).map_err(NetworkError::io("removing a device"))
}

/// Interfaces of `these` whose devices are not among `those`.
fn missing(these: &[Interface], those: &[Interface]) -> Vec<Interface> {
    these
        .iter()
        .filter(|i| those.iter().all(|other| other.device_mac != i.device_mac))
        .cloned()
        .collect()
}

fn retire(gone: &[Interface], applied: &mut Applied, machine: &OwnedFd) -> Result<()> {
    let mut netlink = socket()?;
    for interface in gone {
        let Some(index) = applied.indices.remove(&interface.device_mac) else {
            continue;
        };
        links::retire(&mut netlink, index, machine.as_fd())
            .map_err(NetworkError::io(format!("removing {}", interface.name)))?;
    }
    Ok(())
}

/// Brings interfaces, addresses, neighbours, routes and rules from `old` to `new`.
fn set_up(
    netlink: &mut Rtnetlink,
    applied: &Applied,
    old: &ApplyRequest,
    new: &ApplyRequest,
) -> Result<()> {
    for interface in &new.interfaces {
        if old.interfaces.contains(interface) {
            continue;
        }
        if let Some(index) = applied.indices.get(&interface.device_mac) {
            links::configure(netlink, *index, interface).map_err(NetworkError::io(format!(
                "setting up the interface {}",
                interface.name
            )))?;
        }
    }
    let from = Indices::of(old, applied);
    let to = Indices::of(new, applied);
    // What goes first makes room for what comes.
    for bytes in difference(&old.rules, &new.rules) {
        let message = RouteNetlinkMessage::DelRule(rule(bytes)?);
        request(netlink, "removing a rule", message, 0)?;
    }
    for bytes in difference(&old.routes, &new.routes) {
        if let Some(route) = route(bytes, &from)? {
            let message = RouteNetlinkMessage::DelRoute(route);
            request(netlink, "removing a route", message, 0)?;
        }
    }
    for bytes in difference(&old.neighbours, &new.neighbours) {
        if let Some(neighbour) = neighbour(bytes, &from)? {
            let message = RouteNetlinkMessage::DelNeighbour(neighbour);
            request(netlink, "removing a neighbour", message, 0)?;
        }
    }
    for bytes in difference(&old.addresses, &new.addresses) {
        if let Some(address) = address(bytes, &from)? {
            let message = RouteNetlinkMessage::DelAddress(address);
            request(netlink, "removing an address", message, 0)?;
        }
    }
    for bytes in difference(&new.addresses, &old.addresses) {
        if let Some(address) = address(bytes, &to)? {
            let link_local = link_local(&address).then_some(address.header.index);
            let message = RouteNetlinkMessage::NewAddress(address);
            request(
                netlink,
                "adding an address",
                message,
                NLM_F_CREATE | NLM_F_REPLACE,
            )?;
            if let Some(name) = link_local.and_then(|index| to.name_of(index)) {
                settings::generate_link_local(name);
            }
        }
    }
    for bytes in difference(&new.neighbours, &old.neighbours) {
        if let Some(neighbour) = neighbour(bytes, &to)? {
            let message = RouteNetlinkMessage::NewNeighbour(neighbour);
            request(
                netlink,
                "adding a neighbour",
                message,
                NLM_F_CREATE | NLM_F_REPLACE,
            )?;
        }
    }
    for bytes in difference(&new.routes, &old.routes) {
        if let Some(route) = route(bytes, &to)? {
            let message = RouteNetlinkMessage::NewRoute(route);
            request(
                netlink,
                "adding a route",
                message,
                NLM_F_CREATE | NLM_F_APPEND,
            )?;
        }
    }
    for bytes in difference(&new.rules, &old.rules) {
        let message = RouteNetlinkMessage::NewRule(rule(bytes)?);
        request(netlink, "adding a rule", message, NLM_F_CREATE | NLM_F_EXCL)?;
    }
    Ok(())
}

/// A request that is fine when there is nothing left to do.
fn request(
    netlink: &mut Rtnetlink,
    what: &str,
    message: RouteNetlinkMessage,
    flags: u16,
) -> Result<()> {
    let about = describe(&message);
    match netlink.request(message, flags) {
        Err(e)
            if flags == 0
                && matches!(
                    e.raw_os_error(),
                    Some(libc::ESRCH | libc::ENOENT | libc::ENODEV | libc::EADDRNOTAVAIL)
                ) =>
        {
            Ok(())
        }
        Err(e) if flags != 0 && e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other.map_err(NetworkError::io(format!("{what}{about}"))),
    }
}

/// What a message is about, for the text of an error.
fn describe(message: &RouteNetlinkMessage) -> String {
    use RouteNetlinkMessage as Message;
    match message {
        Message::NewAddress(address) | Message::DelAddress(address) => {
            let length = address.header.prefix_len;
            let mut addresses = address.attributes.iter().filter_map(|a| match a {
                AddressAttribute::Local(ip) | AddressAttribute::Address(ip) => Some(ip),
                _ => None,
            });
            addresses
                .next()
                .map_or(String::new(), |ip| format!(" {ip}/{length}"))
        }
        Message::NewRoute(route) | Message::DelRoute(route) => {
            let length = route.header.destination_prefix_length;
            let mut to = route.attributes.iter().filter_map(|a| match a {
                RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(ip.to_string()),
                RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(ip.to_string()),
                _ => None,
            });
            match to.next() {
                Some(ip) => format!(" to {ip}/{length}"),
                None => " to everywhere".into(),
            }
        }
        _ => String::new(),
    }
}

/// Makes messages of all that a request has, as if every interface were there, in the
/// form in which the kernel gets them.
#[cfg(any(test, fuzzing))]
pub fn messages(request: &ApplyRequest) -> Vec<Vec<u8>> {
    use netlink_packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload};
    use std::iter::zip;

    let macs = request.interfaces.iter().map(|i| i.device_mac.clone());
    let applied = Applied {
        indices: zip(macs, 2..).collect(),
        ..Applied::default()
    };
    let indices = Indices::of(request, &applied);
    let mut messages = Vec::new();
    let all = |list: &[Vec<u8>], decode: &dyn Fn(&[u8]) -> Option<RouteNetlinkMessage>| {
        list.iter()
            .filter_map(|bytes| decode(bytes))
            .collect::<Vec<_>>()
    };
    messages.extend(all(&request.addresses, &|bytes| {
        let address = address(bytes, &indices).ok()??;
        let _ = link_local(&address);
        Some(RouteNetlinkMessage::NewAddress(address))
    }));
    messages.extend(all(&request.routes, &|bytes| {
        let route = route(bytes, &indices).ok()??;
        Some(RouteNetlinkMessage::NewRoute(route))
    }));
    messages.extend(all(&request.neighbours, &|bytes| {
        let neighbour = neighbour(bytes, &indices).ok()??;
        Some(RouteNetlinkMessage::NewNeighbour(neighbour))
    }));
    messages.extend(all(&request.rules, &|bytes| {
        Some(RouteNetlinkMessage::NewRule(rule(bytes).ok()?))
    }));
    let encode = |message: RouteNetlinkMessage| {
        let _ = describe(&message);
        let payload = NetlinkPayload::InnerMessage(message);
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), payload);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    };
    messages.into_iter().map(encode).collect()
}

/// Interfaces of a request: indices on the host, and in the guest.
struct Indices {
    by_host: HashMap<u32, u32>,
    names: HashMap<u32, String>,
}

impl Indices {
    fn of(request: &ApplyRequest, applied: &Applied) -> Indices {
        let mut indices = Indices {
            by_host: HashMap::from([(LOOPBACK, LOOPBACK)]),
            names: HashMap::new(),
        };
        for interface in &request.interfaces {
            if let Some(index) = applied.indices.get(&interface.device_mac) {
                indices.by_host.insert(interface.index, *index);
                indices.names.insert(*index, interface.name.clone());
            }
        }
        indices
    }

    fn get(&self, host: u32) -> Option<u32> {
        self.by_host.get(&host).copied()
    }

    fn name_of(&self, index: u32) -> Option<&str> {
        self.names.get(&index).map(String::as_str)
    }
}

fn address(bytes: &[u8], indices: &Indices) -> Result<Option<AddressMessage>> {
    let buffer = AddressMessageBuffer::new_checked(&bytes).map_err(invalid)?;
    let mut message = AddressMessage::parse(&buffer).map_err(invalid)?;
    let Some(index) = indices.get(message.header.index) else {
        return Ok(None);
    };
    message.header.index = index;
    Ok(Some(message))
}

fn link_local(message: &AddressMessage) -> bool {
    message.attributes.iter().any(|attribute| match attribute {
        AddressAttribute::Address(std::net::IpAddr::V6(address)) => address.is_unicast_link_local(),
        _ => false,
    })
}

/// `None` when it leaves by an interface that is not there.
fn route(bytes: &[u8], indices: &Indices) -> Result<Option<RouteMessage>> {
    let buffer = RouteMessageBuffer::new_checked(&bytes).map_err(invalid)?;
    let mut message = RouteMessage::parse(&buffer).map_err(invalid)?;
    for attribute in &mut message.attributes {
        let numbers: Vec<&mut u32> = match attribute {
            RouteAttribute::Oif(index) | RouteAttribute::Iif(index) => vec![index],
            RouteAttribute::MultiPath(hops) => hops
                .iter_mut()
                .map(|hop| &mut hop.interface_index)
                .collect(),
            _ => continue,
        };
        for number in numbers {
            match indices.get(*number) {
                Some(index) => *number = index,
                None => return Ok(None),
            }
        }
    }
    Ok(Some(message))
}

fn neighbour(bytes: &[u8], indices: &Indices) -> Result<Option<NeighbourMessage>> {
    let buffer = NeighbourMessageBuffer::new_checked(&bytes).map_err(invalid)?;
    let mut message = NeighbourMessage::parse(&buffer).map_err(invalid)?;
    let Some(index) = indices.get(message.header.ifindex) else {
        return Ok(None);
    };
    message.header.ifindex = index;
    Ok(Some(message))
}

fn rule(bytes: &[u8]) -> Result<RuleMessage> {
    let buffer = RuleMessageBuffer::new_checked(&bytes).map_err(invalid)?;
    RuleMessage::parse(&buffer).map_err(invalid)
}

fn invalid(error: netlink_packet_core::DecodeError) -> NetworkError {
    NetworkError::Invalid(error.to_string())
}

/// What is in `these` and not in `those`.
fn difference<'a>(these: &'a [Vec<u8>], those: &[Vec<u8>]) -> Vec<&'a [u8]> {
    these
        .iter()
        .filter(|bytes| !those.contains(bytes))
        .map(Vec::as_slice)
        .collect()
}

/// Everything that is in one or the other.
fn union(old: ApplyRequest, mut new: ApplyRequest) -> ApplyRequest {
    for (to, from) in [
        (&mut new.addresses, old.addresses),
        (&mut new.routes, old.routes),
        (&mut new.neighbours, old.neighbours),
        (&mut new.rules, old.rules),
    ] {
        for bytes in from {
            if !to.contains(&bytes) {
                to.push(bytes);
            }
        }
    }
    // They are to be set up again.
    for interface in &mut new.interfaces {
        interface.mtu = 0;
    }
    new
}

fn socket() -> Result<Rtnetlink> {
    Rtnetlink::new().map_err(NetworkError::io::<io::Error>("opening a netlink socket"))
}
