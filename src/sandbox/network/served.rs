//! Network cards that a program of the host serves over vhost-user (OVS, VPP, passt).
//!
//! There is no interface of the host that they could be read from: what the guest's side is
//! to be comes with them, and is put into the words in which the interfaces of a namespace
//! are described ([`super::snapshot`]).

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use serde::{Deserialize, Serialize};

use super::snapshot::{Link, Snapshot};

/// No interface of a namespace has such an index: the kernel counts from 1.
const FIRST_INDEX: u32 = 1 << 30;

/// A card as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// Of the interface in the container.
    pub name: String,
    /// One of the directories where such sockets may be, and the socket below it.
    pub directory: PathBuf,
    pub socket: PathBuf,
    pub mac: [u8; 6],
    pub mtu: u32,
    pub addresses: Vec<Prefix>,
    pub routes: Vec<Route>,
}

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefix {
    pub address: IpAddr,
    pub len: u8,
}

/// A route by the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub to: Prefix,
    pub via: Option<IpAddr>,
    pub metric: Option<u32>,
}

/// A card and the connection to its program.
#[derive(Debug)]
pub struct Served {
    pub card: Card,
    pub socket: OwnedFd,
}

impl Card {
    /// The card as if it were the `number`th interface of its kind in the namespace.
    #[must_use]
    pub fn snapshot(&self, number: usize) -> Snapshot {
        // At most MAX_INTERFACES.
        let index = FIRST_INDEX + number as u32;
        Snapshot {
            links: vec![Link {
                index,
                name: self.name.clone(),
                kind: None,
                alias: None,
                mac: Some(self.mac),
                is_loopback: false,
                mtu: self.mtu,
                up: true,
                arp: true,
            }],
            addresses: self.addresses.iter().map(|a| a.message(index)).collect(),
            // Gateways are reached by those that have none.
            routes: {
                let mut routes: Vec<_> = self.routes.iter().collect();
                routes.sort_by_key(|route| route.via.is_some());
                routes.iter().map(|route| route.message(index)).collect()
            },
            ..Snapshot::default()
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

impl Prefix {
    /// As it is added, with the route to its network that the kernel makes.
    fn message(self, index: u32) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = family(self.address);
        message.header.prefix_len = self.len;
        message.header.scope = AddressScope::Universe;
        message.header.index = index;
        message.attributes = vec![
            AddressAttribute::Address(self.address),
            AddressAttribute::Local(self.address),
            AddressAttribute::Flags(AddressFlags::Nodad),
        ];
        if let (IpAddr::V4(address), 0..=30) = (self.address, self.len) {
            let host = u32::MAX.checked_shr(self.len.into()).unwrap_or(0);
            let broadcast = Ipv4Addr::from(u32::from(address) | host);
            message
                .attributes
                .push(AddressAttribute::Broadcast(broadcast));
        }
        message
    }
}

impl Route {
    fn message(self, index: u32) -> RouteMessage {
        let mut message = RouteMessage::default();
        let header = &mut message.header;
        header.address_family = family(self.to.address);
        header.destination_prefix_length = self.to.len;
        header.table = RouteHeader::RT_TABLE_MAIN;
        header.protocol = RouteProtocol::Static;
        header.kind = RouteType::Unicast;
        header.scope = match (self.via, self.to.address) {
            (None, IpAddr::V4(_)) => RouteScope::Link,
            _ => RouteScope::Universe,
        };
        let attributes = &mut message.attributes;
        if self.to.len > 0 {
            attributes.push(RouteAttribute::Destination(route_address(self.to.address)));
        }
        attributes.extend(
            self.via
                .map(|via| RouteAttribute::Gateway(route_address(via))),
        );
        attributes.push(RouteAttribute::Oif(index));
        attributes.extend(self.metric.map(RouteAttribute::Priority));
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_described_as_an_interface_would_be() {
        let prefix = |address: &str, len| Prefix {
            address: address.parse().unwrap(),
            len,
        };
        let route = |to, via: Option<&str>| Route {
            to,
            via: via.map(|via| via.parse().unwrap()),
            metric: Some(5),
        };
        let card = Card {
            name: "fast0".into(),
            directory: "/run".into(),
            socket: "x".into(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 9000,
            addresses: vec![prefix("10.1.2.3", 20), prefix("fd00::1", 64)],
            routes: vec![
                route(prefix("0.0.0.0", 0), Some("10.1.0.1")),
                route(prefix("10.9.0.0", 16), None),
            ],
        };
        let snapshot = card.snapshot(3);
        let link = &snapshot.links[0];
        assert_eq!(
            (link.index, link.mtu, link.up),
            (FIRST_INDEX + 3, 9000, true)
        );
        let broadcast = AddressAttribute::Broadcast(Ipv4Addr::new(10, 1, 15, 255));
        assert!(snapshot.addresses[0].attributes.contains(&broadcast));
        assert_eq!(snapshot.addresses[1].header.family, AddressFamily::Inet6);
        let [near, far] = &snapshot.routes[..] else {
            panic!("{:?}", snapshot.routes)
        };
        assert_eq!(near.header.scope, RouteScope::Link);
        assert_eq!(near.header.destination_prefix_length, 16);
        let gateway = RouteAttribute::Gateway(RouteAddress::Inet(Ipv4Addr::new(10, 1, 0, 1)));
        assert!(far.attributes.contains(&gateway));
        assert_eq!(far.header.destination_prefix_length, 0);
    }
}
