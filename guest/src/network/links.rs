//! Interfaces on their way between the machine's network namespace, where new
//! devices appear, and a container's.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use kuasar_runv_protocol::network::Interface;
use kuasar_runv_protocol::rtnetlink::Rtnetlink;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{NetworkError, Result};
use crate::hotplug;

/// How long a device may take to appear.
const DEVICE_DEADLINE: Duration = Duration::from_secs(20);
/// `RTNLGRP_LINK` of rtnetlink(7).
const GROUP_LINK: u32 = 1;

/// Has the kernel find new devices, and returns the index of each interface's, in
/// their order. To be called in the machine's namespace.
pub fn find_new(interfaces: &[&Interface]) -> Result<Vec<u32>> {
    let failed = || NetworkError::io("looking for new devices");
    let mut netlink = Rtnetlink::new().map_err(failed())?;
    let news = Rtnetlink::subscribed(&[GROUP_LINK]).map_err(failed())?;
    hotplug::rescan().map_err(failed())?;
    let end = Instant::now() + DEVICE_DEADLINE;
    let mut found = vec![None; interfaces.len()];
    loop {
        let links = dump(&mut netlink).map_err(failed())?;
        for (index, interface) in found.iter_mut().zip(interfaces) {
            *index = index.or_else(|| by_mac(&links, &interface.device_mac));
        }
        let Some(missing) = found.iter().position(Option::is_none) else {
            return Ok(found.into_iter().flatten().collect());
        };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(NetworkError::NoDevice(interfaces[missing].name.clone()));
        }
        wait_readable(news.as_fd(), left).map_err(failed())?;
        news.drain_news().map_err(failed())?;
    }
}

/// Moves an interface to another namespace under a name that is free there.
pub fn send(netlink: &mut Rtnetlink, index: u32, to: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![
        LinkAttribute::NetNsFd(to.as_raw_fd()),
        LinkAttribute::IfName(name.to_owned()),
    ];
    netlink.request(RouteNetlinkMessage::SetLink(link), 0)
}

/// The index of the interface with this hardware address in the thread's namespace.
pub fn index_of(netlink: &mut Rtnetlink, mac: &[u8]) -> io::Result<Option<u32>> {
    Ok(by_mac(&dump(netlink)?, mac))
}

/// Gives an interface its properties and, at last, its state.
pub fn configure(netlink: &mut Rtnetlink, index: u32, interface: &Interface) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![
        LinkAttribute::IfName(interface.name.clone()),
        LinkAttribute::Mtu(interface.mtu),
    ];
    if interface.mac != interface.device_mac {
        link.attributes
            .push(LinkAttribute::Address(interface.mac.clone()));
    }
    netlink.request(RouteNetlinkMessage::SetLink(link), 0)?;
    super::settings::set(&interface.name, &interface.sysctls);
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
    link.header.flags.set(LinkFlags::Up, interface.up);
    link.header.flags.set(LinkFlags::Noarp, !interface.arp);
    netlink.request(RouteNetlinkMessage::SetLink(link), 0)
}

/// Keeps the kernel from making link-local addresses, which takes it a second each
/// (RFC 4862, 5.4): they are among those that are added.
pub fn no_link_local(netlink: &mut Rtnetlink, index: u32) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
        vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
    )])];
    match netlink.request(RouteNetlinkMessage::SetLink(link), 0) {
        // IPv6 is switched off in this namespace.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EINVAL)) => Ok(()),
        other => other,
    }
}

/// Takes an interface of the container out of use, and to the machine's namespace.
pub fn retire(netlink: &mut Rtnetlink, index: u32, machine: BorrowedFd<'_>) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.change_mask = LinkFlags::Up;
    match netlink.request(RouteNetlinkMessage::SetLink(link), 0) {
        // The host has already taken it away.
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
        other => other?,
    }
    send(netlink, index, machine, &format!("gone{index}"))
}

/// Lets go of the devices that have been retired. In the machine's namespace.
pub fn remove_retired(macs: &[Vec<u8>]) -> io::Result<()> {
    let mut netlink = Rtnetlink::new()?;
    for link in dump(&mut netlink)? {
        let is_retired = address(&link).is_some_and(|mac| macs.iter().any(|m| m == mac));
        if let (true, Some(name)) = (is_retired, name(&link)) {
            hotplug::remove(&Path::new("/sys/class/net").join(name))?;
        }
    }
    Ok(())
}

/// Returns when `fd` is readable, or after some time.
fn wait_readable(fd: BorrowedFd<'_>, time: Duration) -> io::Result<()> {
    let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], time) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn dump(netlink: &mut Rtnetlink) -> io::Result<Vec<LinkMessage>> {
    let links = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(links
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        })
        .collect())
}

fn by_mac(links: &[LinkMessage], mac: &[u8]) -> Option<u32> {
    links
        .iter()
        .find(|link| address(link) == Some(mac))
        .map(|link| link.header.index)
}

fn address(link: &LinkMessage) -> Option<&[u8]> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(address) => Some(address.as_slice()),
            _ => None,
        })
}

fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
}
