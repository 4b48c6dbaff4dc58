//! Sockets of servers, bound as the guest's are, and datagrams that come with the address
//! they were sent to.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};

use kuasar_runv_protocol::loopback::{Port, Protocol};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage,
    recvmsg, sendmsg, setsockopt, sockopt,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// The two ends of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ends {
    /// Of the socket.
    pub port: Port,
    /// What the client has sent to: one of the addresses that the socket is bound to.
    pub server: IpAddr,
    pub client: SocketAddr,
}

impl Ends {
    /// The port that the client has asked.
    pub fn asked(&self) -> Port {
        Port {
            address: self.server,
            ..self.port
        }
    }
}

/// A socket that is bound to the port. IPv6's take no IPv4: for that there is another
/// port.
fn bound(port: Port, kind: SocketType) -> io::Result<OwnedFd> {
    let address = port.socket_address();
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, kind, flags, None)?;
    if address.is_ipv6() {
        rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if port.protocol == Protocol::Tcp {
        // Not before connections of the last one are forgotten, otherwise.
        rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

/// Listens on a TCP port.
///
/// # Errors
/// Of socket(2), bind(2) and listen(2).
pub fn listen(port: Port) -> io::Result<TcpListener> {
    let socket = bound(port, SocketType::STREAM)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Takes datagrams for a UDP port.
///
/// # Errors
/// Of socket(2) and bind(2).
pub fn bind(port: Port) -> io::Result<OwnedFd> {
    let socket = bound(port, SocketType::DGRAM)?;
    match port.address {
        IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
        IpAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?,
    }
    Ok(socket)
}

/// One datagram to the socket of this port: its length, and who sent it where.
///
/// # Errors
/// `WouldBlock` when there is none, and others of recvmsg(2).
pub fn receive(socket: &OwnedFd, port: Port, buffer: &mut [u8]) -> io::Result<(usize, Ends)> {
    let mut space = nix::cmsg_space!(libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut server = None;
    for part in message.cmsgs()? {
        server = match part {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                Some(IpAddr::from(info.ipi_addr.s_addr.to_ne_bytes()))
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => Some(IpAddr::from(info.ipi6_addr.s6_addr)),
            _ => server,
        };
    }
    let client = message.address.as_ref().and_then(socket_address);
    let (Some(server), Some(client)) = (server, client) else {
        return Err(io::Error::other("a datagram without addresses"));
    };
    let ends = Ends {
        port,
        server,
        client,
    };
    Ok((message.bytes, ends))
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::V4((*v4).into()));
    }
    let v6 = address.as_sockaddr_in6()?;
    Some(SocketAddr::V6((*v6).into()))
}

/// Answers a client from the address that it has asked.
///
/// # Errors
/// `WouldBlock` when there is no room, and others of sendmsg(2).
pub fn send(socket: &OwnedFd, bytes: &[u8], ends: &Ends) -> io::Result<()> {
    let fd = socket.as_raw_fd();
    let parts = [IoSlice::new(bytes)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    match (ends.server, ends.client) {
        (IpAddr::V4(server), SocketAddr::V4(client)) => {
            let address = libc::in_addr {
                s_addr: u32::from_ne_bytes(server.octets()),
            };
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: address,
                ipi_addr: address,
            };
            let from = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(fd, &parts, &from, flags, Some(&SockaddrIn::from(client)))?;
        }
        (IpAddr::V6(server), SocketAddr::V6(client)) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: server.octets(),
                },
                ipi6_ifindex: client.scope_id(),
            };
            let from = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(fd, &parts, &from, flags, Some(&SockaddrIn6::from(client)))?;
        }
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpStream, UdpSocket};
    use std::time::Duration;

    fn port(protocol: Protocol, address: &str, number: u16) -> Port {
        Port {
            protocol,
            address: address.parse().unwrap(),
            number,
        }
    }

    fn free(any: &str) -> u16 {
        UdpSocket::bind((any, 0))
            .unwrap()
            .local_addr()
            .unwrap()
            .port()
    }

    /// A client that has asked an address of several hears from that one.
    #[test]
    fn an_answer_comes_from_the_address_that_was_asked() {
        for (any, asked) in [("0.0.0.0", "127.0.0.5"), ("::", "::1")] {
            let port = port(Protocol::Udp, any, free(any));
            let socket = bind(port).unwrap();
            let client = UdpSocket::bind((asked, 0)).unwrap();
            client
                .set_read_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            client.send_to(b"question", (asked, port.number)).unwrap();
            let mut buffer = [0; 20];
            let (len, ends) = receive(&socket, port, &mut buffer).unwrap();
            assert_eq!(buffer[..len], *b"question");
            assert_eq!(ends.client, client.local_addr().unwrap());
            assert_eq!(ends.server.to_string(), asked);
            assert_eq!(ends.asked().socket_address().ip(), ends.server);
            send(&socket, b"answer", &ends).unwrap();
            let (len, from) = client.recv_from(&mut buffer).unwrap();
            assert_eq!(buffer[..len], *b"answer");
            assert_eq!(from, ends.asked().socket_address());
            let none = receive(&socket, port, &mut buffer).unwrap_err();
            assert_eq!(none.kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn both_versions_have_the_same_port_beside_each_other() {
        let number = free("::");
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let bind = |address| match protocol {
                Protocol::Tcp => listen(port(protocol, address, number)).map(OwnedFd::from),
                Protocol::Udp => bind(port(protocol, address, number)),
            };
            let _both = ["0.0.0.0", "::"].map(|address| bind(address).unwrap());
            assert!(bind("0.0.0.0").is_err());
        }
        let listener = listen(port(Protocol::Tcp, "0.0.0.0", number)).unwrap();
        TcpStream::connect(("127.0.0.5", number)).unwrap();
        drop(listener);
    }
}
