//! Making tap interfaces in the network namespace of the calling thread
//! (Documentation/networking/tuntap.rst of the kernel).
//!
//! They are not persistent: a tap goes with the last descriptor of its queues, that
//! is with the hypervisor.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use kuasar_runv_protocol::rtnetlink::Rtnetlink;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};

const DEVICE: &str = "/dev/net/tun";
/// Names of taps; the kernel puts the first free number in.
const NAME_TEMPLATE: &[u8] = b"runv%d";
/// What names of taps start with.
pub const NAME_PREFIX: &str = "runv";

/// A tap interface with everything that is open of it.
#[derive(Debug)]
pub struct Tap {
    pub name: String,
    pub index: u32,
    pub queues: Vec<OwnedFd>,
}

impl Tap {
    /// A tap with this many queues, one for each processor that is to use it. Its
    /// frames have a virtio-net header, so that checksums and segmentation are left
    /// to who needs them.
    ///
    /// # Errors
    /// As open(2) and ioctl(2) of the device.
    pub fn create(netlink: &mut Rtnetlink, queues: u32, mtu: u32) -> io::Result<Tap> {
        let mut request = ifreq(NAME_TEMPLATE);
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let mut fds = Vec::new();
        for _ in 0..queues.max(1) {
            // The name the first one got is in the request for the others.
            fds.push(open_queue(&mut request, flags)?);
        }
        let name = name_of(&request);
        let index = nix::net::if_::if_nametoindex(name.as_str())?;
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes.push(LinkAttribute::Mtu(mtu));
        // The host has nothing to say on it: without an address of its own it does
        // not even look for routers.
        link.attributes
            .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
                vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
            )]));
        match netlink.request(RouteNetlinkMessage::SetLink(link.clone()), 0) {
            // A kernel or a namespace without IPv6.
            Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                link.attributes.truncate(1);
                netlink.request(RouteNetlinkMessage::SetLink(link), 0)?;
            }
            other => other?,
        }
        set_up(netlink, index)?;
        Ok(Tap {
            name,
            index,
            queues: fds,
        })
    }
}

/// Brings an interface up.
///
/// # Errors
/// The kernel's.
pub fn set_up(netlink: &mut Rtnetlink, index: u32) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    netlink.request(RouteNetlinkMessage::SetLink(link), 0)
}

/// Gives an interface another MTU, in bytes.
///
/// # Errors
/// The kernel's.
pub fn set_mtu(netlink: &mut Rtnetlink, index: u32, mtu: u32) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes.push(LinkAttribute::Mtu(mtu));
    netlink.request(RouteNetlinkMessage::SetLink(link), 0)
}

fn open_queue(request: &mut libc::ifreq, flags: libc::c_int) -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(DEVICE)
        .map_err(|e| io::Error::new(e.kind(), format!("{DEVICE}: {e}")))?;
    attach_queue(file.as_raw_fd(), request, flags)?;
    Ok(file.into())
}

/// `TUNSETIFF` of if_tun.h.
///
/// # Errors
/// As ioctl(2).
pub fn attach_queue(fd: i32, request: &mut libc::ifreq, flags: libc::c_int) -> io::Result<()> {
    // The flags of a tap fit: they are bits of a short.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request is a complete ifreq that outlives the call.
    if unsafe { libc::ioctl(fd, libc::TUNSETIFF as libc::Ioctl, &raw mut *request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A request about the interface with this name, at most 15 bytes long.
#[must_use]
pub fn ifreq(name: &[u8]) -> libc::ifreq {
    // SAFETY: ifreq is plain data, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(&name[..name.len().min(15)]) {
        *to = *from as libc::c_char;
    }
    request
}

fn name_of(request: &libc::ifreq) -> String {
    let name = request.ifr_name.iter().take_while(|c| **c != 0);
    name.map(|c| char::from(c.to_ne_bytes()[0])).collect()
}
