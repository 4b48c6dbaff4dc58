//! The kinds of interface a container's network namespace may hold: one file each.
//!
//! A kind says how an interface of it becomes a device of the VM. Most are tied to
//! a tap or the like as `[network] model` says ([`super::model`]).

mod ipvlan;
mod macvlan;
pub mod physical;
mod tap;
mod veth;
mod vlan;

use std::io;

use super::model::{self, Host, Tied, TiedTo};
use super::snapshot::Link;

/// What an endpoint has become.
#[derive(Debug)]
pub enum Connected {
    /// Queues for a virtio-net device.
    Tied(Tied),
    /// The hardware itself, by its PCI address.
    Passed(physical::Passed),
}

/// What is remembered of a [`Connected`].
#[derive(Debug)]
pub enum Connection {
    Tied(TiedTo),
    Passed(physical::Passed),
    /// A program has the other end, and nothing is on the host.
    Served,
}

/// A kind of interface.
pub trait Endpoint: Sync {
    /// In the words of `ip link`, for messages.
    fn kind(&self) -> &'static str;

    /// Whether its hardware address is its own; otherwise the device gets another
    /// one until the guest has found it.
    fn has_own_mac(&self) -> bool {
        true
    }

    /// Connects an interface of this kind.
    ///
    /// # Errors
    /// With the step that failed. Nothing is left then.
    fn connect(&self, host: &mut Host<'_>, link: &Link) -> io::Result<Connected> {
        let model = host.model;
        model::tie(host, link, model).map(Connected::Tied)
    }
}

/// The kind of an interface; `None` for those that cannot be in a VM, which stay
/// where they are.
#[must_use]
pub fn of(link: &Link) -> Option<&'static dyn Endpoint> {
    // What has no hardware address cannot be a network card: tun in IP mode,
    // WireGuard, IP tunnels.
    link.mac?;
    let kinds: [&'static dyn Endpoint; 6] = [
        &veth::Veth,
        &macvlan::Macvlan,
        &ipvlan::Ipvlan,
        &vlan::Vlan,
        &tap::Tap,
        &physical::Physical,
    ];
    let kind = link.kind.as_deref().unwrap_or(physical::KIND);
    kinds.into_iter().find(|endpoint| endpoint.kind() == kind)
}

/// Undoes [`Endpoint::connect`] on the host's side.
///
/// # Errors
/// The kernel's; an endpoint that is gone is no error.
pub fn disconnect(host: &mut Host<'_>, index: u32, connection: &Connection) -> io::Result<()> {
    match connection {
        Connection::Tied(tied) => model::untie(host.netlink, index, tied),
        Connection::Passed(passed) => passed.give_back(host),
        Connection::Served => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(kind: Option<&str>, mac: Option<[u8; 6]>) -> Link {
        Link {
            index: 2,
            name: "x".into(),
            kind: kind.map(str::to_owned),
            alias: None,
            mac,
            is_loopback: false,
            mtu: 1500,
            up: true,
            arp: true,
        }
    }

    #[test]
    fn kinds_are_told_by_what_the_kernel_says() {
        let mac = Some([2, 0, 0, 0, 0, 1]);
        for (kind, expected) in [
            (Some("veth"), Some("veth")),
            (Some("macvlan"), Some("macvlan")),
            (Some("ipvlan"), Some("ipvlan")),
            (Some("vlan"), Some("vlan")),
            (Some("tun"), Some("tun")),
            (None, Some(physical::KIND)),
            (Some("dummy"), None),
            (Some("bridge"), None),
            (Some("vxlan"), None),
        ] {
            assert_eq!(of(&link(kind, mac)).map(Endpoint::kind), expected);
        }
        assert!(of(&link(Some("tun"), None)).is_none());
        assert!(of(&link(Some("wireguard"), None)).is_none());
    }

    #[test]
    fn only_ipvlan_shares_a_hardware_address() {
        let mac = Some([2, 0, 0, 0, 0, 1]);
        for kind in ["veth", "macvlan", "ipvlan", "vlan", "tun"] {
            let endpoint = of(&link(Some(kind), mac)).unwrap();
            assert_eq!(endpoint.has_own_mac(), kind != "ipvlan");
        }
    }
}
