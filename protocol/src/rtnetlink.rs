//! A blocking rtnetlink socket: both sides set up networks, each in the network
//! namespace of the thread that opens the socket (rtnetlink(7), netlink(7)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// How long the kernel may take over an answer. It answers at once, except when
/// somebody else holds the lock of all network configuration.
const DEADLINE: Duration = Duration::from_secs(10);
/// Most messages of one dump that are kept.
const MAX_DUMP: usize = 65_536;
/// Room for notifications that have not been read, in bytes.
const NEWS_BUFFER: usize = 1024 * 1024;

/// A socket for requests, or for news.
#[derive(Debug)]
pub struct Rtnetlink {
    socket: Socket,
    sequence: u32,
}

impl Rtnetlink {
    /// A socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// As socket(2).
    pub fn new() -> io::Result<Rtnetlink> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        set_timeout(socket.as_fd(), DEADLINE)?;
        Ok(Rtnetlink {
            socket,
            sequence: 0,
        })
    }

    /// A socket that gets the news of these groups (`RTNLGRP_*`).
    ///
    /// # Errors
    /// As socket(2).
    pub fn subscribed(groups: &[u32]) -> io::Result<Rtnetlink> {
        let netlink = Rtnetlink::new()?;
        netlink.socket.set_rx_buf_sz(NEWS_BUFFER as libc::c_int)?;
        for group in groups {
            netlink.socket.add_membership(*group)?;
        }
        netlink.socket.set_non_blocking(true)?;
        Ok(netlink)
    }

    /// Has the kernel do something; `flags` are those of netlink(7) besides
    /// `NLM_F_REQUEST` and `NLM_F_ACK`.
    ///
    /// # Errors
    /// The kernel's, and `TimedOut`.
    pub fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let sequence = self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.answers(sequence, &mut |_| ())
    }

    /// Everything of a kind, as a `Get` message asks for it. What the parser does
    /// not understand is left out and logged.
    ///
    /// # Errors
    /// The kernel's, and `TimedOut`; `InvalidData` for more than can be kept.
    pub fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        let sequence = self.send(message, NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut found = Vec::new();
        let mut count = 0;
        self.answers(sequence, &mut |message| {
            count += 1;
            if count <= MAX_DUMP {
                found.push(message);
            }
        })?;
        if count > MAX_DUMP {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("more than {MAX_DUMP} entries"),
            ));
        }
        Ok(found)
    }

    /// Reads all news that are there; whether there were any, or some were lost.
    ///
    /// # Errors
    /// As recvmsg(2).
    pub fn drain_news(&self) -> io::Result<bool> {
        let mut news = false;
        let mut buffer = vec![0; 32 * 1024];
        loop {
            match self.socket.recv(&mut &mut buffer[..], 0) {
                Ok(_) => news = true,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(news),
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => news = true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        Ok(self.sequence)
    }

    /// Receives the answers to one request, to the last.
    fn answers(&self, sequence: u32, take: &mut dyn FnMut(RouteNetlinkMessage)) -> io::Result<()> {
        loop {
            let datagram = match self.socket.recv_from_full() {
                Ok((datagram, _)) => datagram,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(e) => return Err(e),
            };
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let (message, behind) = split_message(rest)?;
                rest = behind;
                if sequence_of(message) != sequence {
                    // A late answer to a request that was given up.
                    continue;
                }
                match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) {
                    Ok(message) => match message.payload {
                        NetlinkPayload::InnerMessage(inner) => take(inner),
                        NetlinkPayload::Done(done) if done.code < 0 => {
                            return Err(io::Error::from_raw_os_error(-done.code));
                        }
                        NetlinkPayload::Done(_) => return Ok(()),
                        NetlinkPayload::Error(error) => {
                            return match error.code {
                                None => Ok(()),
                                Some(_) => Err(error.to_io()),
                            };
                        }
                        _ => {}
                    },
                    Err(e) => log::warn!("a message of the kernel is not understood: {e}"),
                }
            }
        }
    }
}

impl AsFd for Rtnetlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The first message of a datagram, and what follows it (netlink(7): each message
/// is padded to four bytes).
fn split_message(bytes: &[u8]) -> io::Result<(&[u8], &[u8])> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let buffer = NetlinkBuffer::new_checked(bytes).map_err(|_| invalid())?;
    let length = buffer.length() as usize;
    let message = bytes.get(..length).ok_or_else(invalid)?;
    let padded = length.next_multiple_of(4).min(bytes.len());
    Ok((message, &bytes[padded..]))
}

fn sequence_of(message: &[u8]) -> u32 {
    NetlinkBuffer::new(message).sequence_number()
}

fn set_timeout(socket: BorrowedFd<'_>, timeout: Duration) -> io::Result<()> {
    let value = libc::timeval {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_usec: 0,
    };
    // SAFETY: the option takes a timeval, which outlives the call.
    let rc = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const value).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::link::LinkMessage;

    #[test]
    fn the_loopback_interface_is_always_there() {
        let mut netlink = Rtnetlink::new().unwrap();
        let get = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let links = netlink.dump(get).unwrap();
        assert!(links.iter().any(|link| matches!(
            link,
            RouteNetlinkMessage::NewLink(link) if link.header.index == 1
        )));
    }

    #[test]
    fn a_refusal_is_the_kernels_error() {
        let mut netlink = Rtnetlink::new().unwrap();
        let mut link = LinkMessage::default();
        link.header.index = 0x7fff_fff0;
        let refused = netlink
            .request(RouteNetlinkMessage::SetLink(link), 0)
            .unwrap_err();
        assert!(
            matches!(refused.raw_os_error(), Some(libc::ENODEV | libc::EPERM)),
            "{refused}"
        );
    }

    #[test]
    fn datagrams_with_wrong_lengths_are_refused() {
        for bytes in [&[0u8; 3][..], &[255; 16], &[17, 0, 0, 0, 0, 0, 0, 0]] {
            assert!(split_message(bytes).is_err());
        }
    }
}
