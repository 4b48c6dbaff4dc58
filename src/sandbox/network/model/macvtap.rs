//! `macvtap`: a macvtap interface on top of the endpoint, in passthru mode, whose
//! character device is the queue (tc and the host's network stack are left out).
//!
//! The interface stays when its device is closed. Its alias names the sandbox, so
//! that `delete` finds what a dead VM has left.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use kuasar_runv_protocol::rtnetlink::Rtnetlink;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoMacVtap, LinkAttribute, LinkInfo, LinkMessage, MacVtapMode,
};

use super::{Host, Tied, step};
use crate::config::NetworkModel;
use crate::sandbox::network::snapshot::Link;
use crate::sandbox::network::tap;

pub(super) fn tie(host: &mut Host<'_>, link: &Link) -> io::Result<Tied> {
    let sysfs = host.sysfs.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::Unsupported,
            "the model macvtap needs a sysfs of the network namespace, which cannot be mounted",
        )
    })?;
    // One on each endpoint, so its index makes the name unique.
    let name = format!("{}{}", tap::NAME_PREFIX, link.index);
    create(host.netlink, link, &name).map_err(step("making a macvtap interface"))?;
    let index = nix::net::if_::if_nametoindex(name.as_str())?;
    let named = set_alias(host.netlink, index, &host.owner);
    let opened = named.and_then(|()| {
        tap::set_up(host.netlink, index)?;
        let dev = format!("class/net/{name}/macvtap/tap{index}/dev");
        let queues = sysfs.open_device(dev, host.queues)?;
        prepare(&queues)?;
        Ok(queues)
    });
    match opened {
        Ok(queues) => Ok(Tied {
            queues,
            index,
            model: NetworkModel::Macvtap,
        }),
        Err(e) => {
            // The first error is the one to report.
            let _ = remove(host.netlink, index);
            Err(step("opening the device of a macvtap interface")(e))
        }
    }
}

/// Removes a macvtap interface.
///
/// # Errors
/// The kernel's; one that is gone is no error.
pub(super) fn remove(netlink: &mut Rtnetlink, index: u32) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    match netlink.request(RouteNetlinkMessage::DelLink(link), 0) {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other,
    }
}

/// The kernel takes no alias with a new interface.
fn set_alias(netlink: &mut Rtnetlink, index: u32, alias: &str) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![LinkAttribute::IfAlias(alias.to_owned())];
    netlink.request(RouteNetlinkMessage::SetLink(link), 0)
}

fn create(netlink: &mut Rtnetlink, lower: &Link, name: &str) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Link(lower.index),
        LinkAttribute::Mtu(lower.mtu),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::MacVtap),
            LinkInfo::Data(InfoData::MacVtap(vec![InfoMacVtap::Mode(
                MacVtapMode::Passthrough,
            )])),
        ]),
    ];
    let add = RouteNetlinkMessage::NewLink(link);
    netlink.request(add, NLM_F_CREATE | NLM_F_EXCL)
}

/// Frames with a virtio-net header, as from a tap.
fn prepare(queues: &[OwnedFd]) -> io::Result<()> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues.len() > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    for queue in queues {
        tap::attach_queue(queue.as_raw_fd(), &mut tap::ifreq(b""), flags)?;
    }
    Ok(())
}
