//! Interfaces on their way between the machine's network namespace, where new
//! devices appear, and a container's.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
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
/// The interfaces of the network namespace that sysfs was mounted in: the machine's.
const INTERFACES: &str = "/sys/class/net";
/// `RTNLGRP_LINK` of rtnetlink(7).
const GROUP_LINK: u32 = 1;

/// Has the kernel find new devices, and returns the index of each interface's, in
/// their order. To be called in the machine's namespace.
pub fn find_new(interfaces: &[&Interface]) -> Result<Vec<u32>> {
    let failed = || NetworkError::io("looking for new devices");
    hotplug::rescan().map_err(failed())?;
    // Their drivers have usually taken them by then.
    let mut found = vec![None; interfaces.len()];
    if look(interfaces, &mut found).map_err(failed())?.is_none() {
        return Ok(found.into_iter().flatten().collect());
    }
    let news = Rtnetlink::subscribed(&[GROUP_LINK]).map_err(failed())?;
    let end = Instant::now() + DEVICE_DEADLINE;
    loop {
        let Some(missing) = look(interfaces, &mut found).map_err(failed())? else {
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

/// Fills in the indices of those that are there; the first that is not.
fn look(interfaces: &[&Interface], found: &mut [Option<u32>]) -> io::Result<Option<usize>> {
    let links = all()?;
    for (index, interface) in found.iter_mut().zip(interfaces) {
        let device = links.iter().find(|link| link.mac == interface.device_mac);
        *index = index.or(device.map(|link| link.index));
    }
    Ok(found.iter().position(Option::is_none))
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
    for link in all()? {
        if macs.contains(&link.mac) {
            hotplug::remove(&link.path)?;
        }
    }
    Ok(())
}

/// An interface of the machine's namespace.
struct Link {
    path: PathBuf,
    mac: Vec<u8>,
    index: u32,
}

/// All of them, from sysfs: to take the kernel's messages apart, which tell much more of
/// each, costs an emulated machine three times as much.
fn all() -> io::Result<Vec<Link>> {
    let mut links = Vec::new();
    for entry in fs::read_dir(INTERFACES)? {
        let path = entry?.path();
        let read = |name| fs::read_to_string(path.join(name));
        let (address, index) = match (read("address"), read("ifindex")) {
            (Ok(address), Ok(index)) => (address, index),
            // It has just gone, or is a file of the bonding driver.
            _ => continue,
        };
        if let (Some(mac), Ok(index)) = (parse_mac(address.trim()), index.trim().parse()) {
            links.push(Link { path, mac, index });
        }
    }
    Ok(links)
}

/// Bytes in hexadecimal, separated by colons.
fn parse_mac(text: &str) -> Option<Vec<u8>> {
    let byte = |byte| u8::from_str_radix(byte, 16).ok();
    text.split(':').map(byte).collect()
}

/// Returns when `fd` is readable, or after some time.
fn wait_readable(fd: BorrowedFd<'_>, time: Duration) -> io::Result<()> {
    let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], time) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_are_read() {
        assert_eq!(
            parse_mac("02:72:75:6e:00:0a"),
            Some(vec![2, 0x72, 0x75, 0x6e, 0, 10])
        );
        for bad in ["", "02:zz", "02:"] {
            assert_eq!(parse_mac(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_loopback_interface_is_among_them() {
        let links = all().unwrap();
        let lo = links.iter().find(|link| link.path.ends_with("lo"));
        let lo = lo.map(|link| (link.index, link.mac.as_slice()));
        assert_eq!(lo, Some((1, &[0; 6][..])));
    }
}
