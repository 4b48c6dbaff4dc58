//! What is in the network namespace of the calling thread: the part of it that
//! engines set and the container is to find.
//!
//! Addresses, routes, neighbours and rules stay messages of the kernel, because
//! another kernel of the same family will read them; what is only of interest here
//! (statistics, counters, times) is taken out, so that two snapshots of the same
//! network are equal.

use std::io;

use kuasar_runv_protocol::rtnetlink::Rtnetlink;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteNextHopFlags, RouteProtocol, RouteType,
};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

/// Groups of rtnetlink(7) that tell when a snapshot is out of date: `RTNLGRP_LINK`,
/// `_NEIGH`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_IFADDR`,
/// `_IPV6_ROUTE`, `_IPV6_RULE`, `_IPV4_NETCONF`, `_IPV6_NETCONF`.
pub const NEWS: [u32; 10] = [1, 3, 5, 7, 8, 9, 11, 19, 24, 25];

/// The routing table of the kernel's own entries (`RT_TABLE_LOCAL`).
const TABLE_LOCAL: u32 = 255;
/// The loopback interface's index in every network namespace.
pub const LOOPBACK: u32 = 1;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// Kind in the words of `ip link` ("veth"); `None` for hardware and loopback.
    pub kind: Option<String>,
    /// Free text (`ip link set alias`).
    pub alias: Option<String>,
    /// Its hardware address, if it is an Ethernet interface.
    pub mac: Option<[u8; 6]>,
    pub is_loopback: bool,
    pub mtu: u32,
    pub up: bool,
    /// Whether it resolves addresses (not `IFF_NOARP`).
    pub arp: bool,
}

/// See the module's header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub links: Vec<Link>,
    pub addresses: Vec<AddressMessage>,
    /// Those without a gateway first: gateways are reached through them.
    pub routes: Vec<RouteMessage>,
    pub neighbours: Vec<NeighbourMessage>,
    pub rules: Vec<RuleMessage>,
}

impl Snapshot {
    /// # Errors
    /// The kernel's.
    pub fn take(netlink: &mut Rtnetlink) -> io::Result<Snapshot> {
        use RouteNetlinkMessage as Message;
        let mut snapshot = Snapshot::default();
        for message in netlink.dump(Message::GetLink(LinkMessage::default()))? {
            if let Message::NewLink(link) = message {
                snapshot.links.extend(read_link(&link));
            }
        }
        for message in netlink.dump(Message::GetAddress(AddressMessage::default()))? {
            if let Message::NewAddress(address) = message {
                snapshot.addresses.extend(clean_address(address));
            }
        }
        for message in netlink.dump(Message::GetRoute(RouteMessage::default()))? {
            if let Message::NewRoute(route) = message {
                snapshot.routes.extend(clean_route(route));
            }
        }
        snapshot.routes.sort_by_key(has_gateway);
        for message in netlink.dump(Message::GetNeighbour(NeighbourMessage::default()))? {
            if let Message::NewNeighbour(neighbour) = message {
                snapshot.neighbours.extend(clean_neighbour(neighbour));
            }
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut get = RuleMessage::default();
            get.header.family = family;
            match netlink.dump(Message::GetRule(get)) {
                Ok(rules) => {
                    snapshot
                        .rules
                        .extend(rules.into_iter().filter_map(|rule| match rule {
                            Message::NewRule(rule) => clean_rule(rule),
                            _ => None,
                        }))
                }
                // A kernel without rules for this family.
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(snapshot)
    }
}

fn read_link(message: &LinkMessage) -> Option<Link> {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: None,
        alias: None,
        mac: None,
        is_loopback: flags.contains(LinkFlags::Loopback),
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        arp: !flags.contains(LinkFlags::Noarp),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(address)
                if message.header.link_layer_type == LinkLayerType::Ether =>
            {
                link.mac = address.as_slice().try_into().ok();
            }
            LinkAttribute::LinkInfo(info) => {
                link.kind = info.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn clean_address(mut message: AddressMessage) -> Option<AddressMessage> {
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let mut from_router = false;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Protocol(AddressProtocol::RouterAnnouncement) => from_router = true,
            _ => {}
        }
    }
    // What the kernel has made of a router's announcement, the guest's kernel makes
    // itself where it is to.
    from_router |= flags.contains(AddressFlags::Managetempaddr);
    if from_router {
        return None;
    }
    message.attributes.retain(|attribute| {
        matches!(
            attribute,
            AddressAttribute::Address(_)
                | AddressAttribute::Local(_)
                | AddressAttribute::Label(_)
                | AddressAttribute::Broadcast(_)
        )
    });
    // Somebody has already checked that nobody else has the address, and the routes
    // that come with it are in the list of routes.
    let flags = (flags & (AddressFlags::Homeaddress | AddressFlags::Mcautojoin))
        | AddressFlags::Nodad
        | AddressFlags::Noprefixroute;
    message.header.flags = AddressHeaderFlags::empty();
    message.attributes.push(AddressAttribute::Flags(flags));
    Some(message)
}

fn clean_route(mut message: RouteMessage) -> Option<RouteMessage> {
    let header = &mut message.header;
    let table = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let is_made_by_the_kernel = matches!(
        header.protocol,
        RouteProtocol::Ra | RouteProtocol::IcmpRedirect
    );
    let is_of_engines = matches!(
        header.kind,
        RouteType::Unicast | RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit
    );
    if table.unwrap_or(header.table.into()) == TABLE_LOCAL
        || header.flags.contains(RouteFlags::Cloned)
        || is_made_by_the_kernel
        || !is_of_engines
    {
        return None;
    }
    // Of IPv6, the kernel's multicast routes are in the local table, and unreachable
    // routes of its own on the loopback interface have no table.
    header.flags &= RouteFlags::Onlink;
    clean_route_attributes(&mut message.attributes);
    Some(message)
}

fn clean_route_attributes(attributes: &mut Vec<RouteAttribute>) {
    /// `RTA_NH_ID` of linux/rtnetlink.h: a shared next hop, which is spelled out too.
    const NH_ID: u16 = 30;
    use netlink_packet_core::Nla;
    attributes.retain(|attribute| match attribute {
        RouteAttribute::CacheInfo(_)
        | RouteAttribute::Expires(_)
        | RouteAttribute::MfcStats(_)
        | RouteAttribute::MulticastExpires(_) => false,
        RouteAttribute::Other(other) => other.kind() != NH_ID,
        _ => true,
    });
    for attribute in attributes {
        if let RouteAttribute::MultiPath(hops) = attribute {
            for hop in hops {
                hop.flags &= RouteNextHopFlags::Onlink;
                clean_route_attributes(&mut hop.attributes);
            }
        }
    }
}

fn has_gateway(route: &RouteMessage) -> bool {
    route.attributes.iter().any(|attribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
        )
    })
}

fn clean_neighbour(mut message: NeighbourMessage) -> Option<NeighbourMessage> {
    // What the kernel has learned, the guest's kernel learns itself.
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    message.attributes.retain(|attribute| {
        matches!(
            attribute,
            NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_)
        )
    });
    Some(message)
}

/// `None` for the rules that every network namespace starts with (ip-rule(8)).
fn clean_rule(message: RuleMessage) -> Option<RuleMessage> {
    const DEFAULT: [(u32, u32); 3] = [(0, TABLE_LOCAL), (32766, 254), (32767, 253)];
    let mut priority = 0;
    let mut table = message.header.table.into();
    let mut is_plain = message.header.src_len == 0 && message.header.dst_len == 0;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Protocol(_)
            | RuleAttribute::SuppressPrefixLen(u32::MAX)
            | RuleAttribute::Other(_) => {}
            _ => is_plain = false,
        }
    }
    (!is_plain || !DEFAULT.contains(&(priority, table))).then_some(message)
}

/// Index of the interface a route leaves by; `None` when there is none, or several.
#[must_use]
pub fn route_interfaces(route: &RouteMessage) -> Vec<u32> {
    let mut found = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => found.push(*index),
            RouteAttribute::MultiPath(hops) => {
                found.extend(hops.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    found
}

/// A route to everything, for tests.
#[cfg(test)]
pub fn default_route(oif: u32) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route.header.table = netlink_packet_route::route::RouteHeader::RT_TABLE_MAIN;
    route.header.kind = RouteType::Unicast;
    route.attributes.push(RouteAttribute::Oif(oif));
    route
}
