//! What the agent is told: the network as the container is to see it.

use std::fs;

use kuasar_runv_protocol::network::{ApplyRequest, Interface, Sysctl};
use netlink_packet_core::Emitable;
use netlink_packet_route::route::{RouteMessage, RouteProtocol};

use super::snapshot::{LOOPBACK, Link, Snapshot, route_interfaces};

/// Settings of an interface that are carried over (Documentation/networking/
/// ip-sysctl.rst of the kernel): all that decide how it treats packets and
/// neighbours. What only the kernel sets is not among them.
const SYSCTLS: [(&str, &[&str]); 2] = [
    (
        "ipv4",
        &[
            "accept_local",
            "accept_redirects",
            "accept_source_route",
            "arp_accept",
            "arp_announce",
            "arp_filter",
            "arp_ignore",
            "arp_notify",
            "drop_gratuitous_arp",
            "drop_unicast_in_l2_multicast",
            "forwarding",
            "ignore_routes_with_linkdown",
            "log_martians",
            "proxy_arp",
            "proxy_arp_pvlan",
            "route_localnet",
            "rp_filter",
            "secure_redirects",
            "send_redirects",
            "src_valid_mark",
        ],
    ),
    (
        "ipv6",
        &[
            "disable_ipv6",
            "accept_ra",
            "accept_ra_defrtr",
            "accept_ra_pinfo",
            "accept_redirects",
            "accept_source_route",
            "autoconf",
            "drop_unicast_in_l2_multicast",
            "forwarding",
            "ignore_routes_with_linkdown",
            "keep_addr_on_down",
            "ndisc_notify",
            "proxy_ndp",
            "router_solicitations",
            "use_tempaddr",
        ],
    ),
];

/// An interface the guest has, or is about to get.
pub struct Card<'a> {
    pub link: &'a Link,
    /// Hardware address its device was plugged in with.
    pub device_mac: [u8; 6],
}

/// The request for these interfaces and all that goes with them.
///
/// To be called in the network namespace.
#[must_use]
pub fn request(container: &str, cards: &[Card<'_>], snapshot: &Snapshot) -> ApplyRequest {
    let has = |index: u32| cards.iter().any(|card| card.link.index == index);
    let mut request = ApplyRequest {
        container_id: container.to_owned(),
        interfaces: cards.iter().map(interface).collect(),
        ..ApplyRequest::default()
    };
    for address in &snapshot.addresses {
        let is_extra = address.header.index == LOOPBACK && !is_of_loopback(address);
        if has(address.header.index) || is_extra {
            request.addresses.push(bytes(address));
        }
    }
    for route in &snapshot.routes {
        let interfaces = route_interfaces(route);
        let reachable = interfaces
            .iter()
            .all(|index| *index == LOOPBACK || has(*index));
        if reachable && !is_of_loopback_itself(route, &interfaces) {
            request.routes.push(bytes(route));
        }
    }
    for neighbour in &snapshot.neighbours {
        if has(neighbour.header.ifindex) {
            request.neighbours.push(bytes(neighbour));
        }
    }
    request.rules = snapshot.rules.iter().map(bytes).collect();
    request
}

fn interface(card: &Card<'_>) -> Interface {
    let link = card.link;
    Interface {
        device_mac: card.device_mac.to_vec(),
        index: link.index,
        name: link.name.clone(),
        mac: link.mac.unwrap_or(card.device_mac).to_vec(),
        mtu: link.mtu,
        up: link.up,
        arp: link.arp,
        sysctls: sysctls(&link.name),
        ..Interface::default()
    }
}

/// The settings of an interface in the network namespace of this thread.
fn sysctls(interface: &str) -> Vec<Sysctl> {
    let mut found = Vec::new();
    for (family, names) in SYSCTLS {
        for name in names {
            // What this kernel does not know, or has no family for, nobody has set.
            let path = format!("/proc/sys/net/{family}/conf/{interface}/{name}");
            if let Ok(value) = fs::read_to_string(path) {
                found.push(Sysctl {
                    family: family.to_owned(),
                    name: (*name).to_owned(),
                    value: value.trim().to_owned(),
                    ..Sysctl::default()
                });
            }
        }
    }
    found
}

fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

/// Whether it is one of the two addresses every loopback interface has.
fn is_of_loopback(address: &netlink_packet_route::address::AddressMessage) -> bool {
    use netlink_packet_route::address::AddressAttribute;
    address.attributes.iter().any(|attribute| match attribute {
        AddressAttribute::Address(address) => address.is_loopback(),
        _ => false,
    })
}

/// Whether the kernel makes a route by itself, for the loopback interface.
fn is_of_loopback_itself(route: &RouteMessage, interfaces: &[u32]) -> bool {
    interfaces == [LOOPBACK] && route.header.protocol == RouteProtocol::Kernel
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::default_route;
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.into(),
            kind: Some("veth".into()),
            alias: None,
            mac: Some([2, 0, 0, 0, 0, 1]),
            is_loopback: false,
            mtu: 1500,
            up: true,
            arp: true,
        }
    }

    #[test]
    fn routes_go_along_with_their_interfaces() {
        let eth0 = link(2, "krt-none0");
        let cards = [Card {
            link: &eth0,
            device_mac: [2, 0, 0, 0, 0, 9],
        }];
        let snapshot = Snapshot {
            routes: vec![default_route(2), default_route(7)],
            ..Snapshot::default()
        };
        let request = request("c", &cards, &snapshot);
        assert_eq!(request.routes.len(), 1);
        let interface = &request.interfaces[0];
        assert_eq!(interface.device_mac, [2, 0, 0, 0, 0, 9]);
        assert_eq!(interface.mac, [2, 0, 0, 0, 0, 1]);
        assert!(interface.sysctls.is_empty());
    }

    #[test]
    fn the_settings_of_an_interface_are_read() {
        let sysctls = sysctls("lo");
        assert!(sysctls.iter().any(|s| s.name == "rp_filter"), "{sysctls:?}");
    }
}
