//! The loopback port: what lies between the loopback interface of a container's
//! network namespace on the host and that of its namespace in the guest.
//!
//! Engines enter the namespace on the host and expect the container's loopback
//! interface there: they dial `localhost` for a port-forward, and answer names at an
//! address of the loopback network. Every connection is opened by the host and says
//! with a [`Request`] what it is for; the guest answers with one [`Answer`] byte,
//! after which follows
//!
//! - [`Purpose::Listeners`]: the set of ports that are listened on, from the guest, at
//!   once and whenever it has changed ([`encode_ports`]);
//! - [`Purpose::Connect`]: the bytes of a connection to one of those ports, either way;
//! - [`Purpose::Datagrams`]: [`Frame`]s with the datagrams of all clients and servers,
//!   either way;
//! - [`Purpose::Resolve`]: [`Query`]s for a name server, from the guest, and as the
//!   answers the same the other way, with the number of the query and nothing in those
//!   that failed.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::stream::{MAX_ID_LEN, Malformed};

/// First bytes of every connection.
const MAGIC: [u8; 4] = *b"RVL2";
/// The port of name servers.
pub const DNS_PORT: u16 = 53;
/// Most ports of a container that are connected.
pub const MAX_PORTS: usize = 256;
/// Most clients of a container's UDP ports at the same time.
pub const MAX_SESSIONS: usize = 128;
/// Longest message of a name server, in bytes.
pub const MAX_DNS_MESSAGE: usize = 65_535;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Listeners,
    Connect(Port),
    /// Serve this address of the loopback network as a name server.
    Resolve(Ipv4Addr),
    Datagrams,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// A port of a server: where it is bound, or where it is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    pub protocol: Protocol,
    pub address: IpAddr,
    pub number: u16,
}

/// Bytes of a port: protocol, family, address, number.
pub const PORT_LEN: usize = 20;

impl Port {
    /// Where it is found in its network namespace.
    #[must_use]
    pub fn socket_address(self) -> SocketAddr {
        SocketAddr::new(self.address, self.number)
    }

    /// Whether a server that is bound there is one that others are to reach: at all
    /// addresses, the usual ones of the loopback interface, or one of a network card.
    /// Other addresses of the loopback network are those of engines' own servers, and
    /// those of a link mean nothing without it.
    #[must_use]
    pub fn is_served(self) -> bool {
        let is_usual = match self.address {
            IpAddr::V4(a) if a.is_loopback() => a == Ipv4Addr::LOCALHOST,
            IpAddr::V4(a) => !a.is_multicast() && !a.is_broadcast() && !a.is_link_local(),
            IpAddr::V6(a) => {
                !a.is_multicast() && !a.is_unicast_link_local() && a.to_ipv4_mapped().is_none()
            }
        };
        is_usual && self.number != 0
    }

    fn encode(self) -> [u8; PORT_LEN] {
        let mut wire = [0; PORT_LEN];
        wire[0] = match self.protocol {
            Protocol::Tcp => 0,
            Protocol::Udp => 1,
        };
        match self.address {
            IpAddr::V4(address) => {
                wire[1] = 4;
                wire[2..6].copy_from_slice(&address.octets());
            }
            IpAddr::V6(address) => {
                wire[1] = 6;
                wire[2..18].copy_from_slice(&address.octets());
            }
        }
        wire[18..].copy_from_slice(&self.number.to_le_bytes());
        wire
    }

    fn decode(wire: [u8; PORT_LEN]) -> Result<Port, Malformed> {
        let [protocol, family, .., low, high] = wire;
        let protocol = match protocol {
            0 => Protocol::Tcp,
            1 => Protocol::Udp,
            _ => return Err(Malformed("unknown protocol")),
        };
        let mut octets = [0; 16];
        octets.copy_from_slice(&wire[2..18]);
        let [a, b, c, d, ..] = octets;
        let address: IpAddr = match family {
            4 => Ipv4Addr::new(a, b, c, d).into(),
            6 => Ipv6Addr::from(octets).into(),
            _ => return Err(Malformed("unknown address family")),
        };
        let number = u16::from_le_bytes([low, high]);
        if number == 0 {
            return Err(Malformed("port 0"));
        }
        Ok(Port {
            protocol,
            address,
            number,
        })
    }
}

/// The first bytes of a connection: [`MAGIC`], the purpose, its argument (a port, or an
/// address in its first bytes), the length of the container id, the id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub purpose: Purpose,
    pub container_id: String,
}

/// Bytes of a request before the id.
pub const REQUEST_PREFIX_LEN: usize = MAGIC.len() + 1 + PORT_LEN + 1;

/// What the guest says to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Answer {
    Yes = 0,
    /// Nobody listens on the port, or the container's network is gone.
    Refused = 1,
    Failed = 2,
}

impl Answer {
    #[must_use]
    pub fn of(byte: u8) -> Answer {
        match byte {
            0 => Answer::Yes,
            1 => Answer::Refused,
            _ => Answer::Failed,
        }
    }
}

impl Request {
    /// # Errors
    /// An id that is longer than [`MAX_ID_LEN`].
    pub fn encode(&self) -> Result<Vec<u8>, Malformed> {
        let mut argument = [0; PORT_LEN];
        let kind = match self.purpose {
            Purpose::Listeners => 0,
            Purpose::Connect(port) => {
                argument = port.encode();
                1
            }
            Purpose::Resolve(address) => {
                argument[..4].copy_from_slice(&address.octets());
                2
            }
            Purpose::Datagrams => 3,
        };
        let len = match u8::try_from(self.container_id.len()) {
            Ok(len) if self.container_id.len() <= MAX_ID_LEN => len,
            _ => return Err(Malformed("id too long")),
        };
        let mut wire = MAGIC.to_vec();
        wire.push(kind);
        wire.extend_from_slice(&argument);
        wire.push(len);
        wire.extend_from_slice(self.container_id.as_bytes());
        Ok(wire)
    }

    /// The purpose, and the length of the id that follows the prefix.
    ///
    /// # Errors
    /// Not a request of this protocol.
    pub fn decode_prefix(prefix: [u8; REQUEST_PREFIX_LEN]) -> Result<(Purpose, usize), Malformed> {
        let [m0, m1, m2, m3, kind, argument @ .., len] = prefix;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(Malformed("wrong magic"));
        }
        let purpose = match kind {
            0 => Purpose::Listeners,
            1 => Purpose::Connect(Port::decode(argument)?),
            2 => {
                let [a, b, c, d, ..] = argument;
                let address = Ipv4Addr::new(a, b, c, d);
                if !address.is_loopback() {
                    return Err(Malformed("not an address of the loopback network"));
                }
                Purpose::Resolve(address)
            }
            3 => Purpose::Datagrams,
            _ => return Err(Malformed("unknown purpose")),
        };
        if len == 0 {
            return Err(Malformed("empty container id"));
        }
        Ok((purpose, usize::from(len)))
    }
}

/// A set of ports: their number (two bytes), then the ports. Those beyond [`MAX_PORTS`]
/// are left out.
#[must_use]
pub fn encode_ports(ports: &BTreeSet<Port>) -> Vec<u8> {
    let count = ports.len().min(MAX_PORTS);
    // The bound above is far below u16::MAX.
    let mut wire = (count as u16).to_le_bytes().to_vec();
    for port in ports.iter().take(count) {
        wire.extend_from_slice(&port.encode());
    }
    wire
}

/// The first set of ports in these bytes, and how many of them it takes; `None` when it
/// is not complete.
///
/// # Errors
/// Not a set of ports that are [served](Port::is_served).
pub fn decode_ports(bytes: &[u8]) -> Result<Option<(BTreeSet<Port>, usize)>, Malformed> {
    let Some((count, rest)) = bytes.split_first_chunk::<2>() else {
        return Ok(None);
    };
    let count = usize::from(u16::from_le_bytes(*count));
    if count > MAX_PORTS {
        return Err(Malformed("too many ports"));
    }
    let Some(mut entries) = rest.get(..count * PORT_LEN) else {
        return Ok(None);
    };
    let mut ports = BTreeSet::new();
    while let Some((entry, others)) = entries.split_first_chunk() {
        let port = Port::decode(*entry)?;
        if !port.is_served() {
            return Err(Malformed("not an address that is served"));
        }
        ports.insert(port);
        entries = others;
    }
    Ok(Some((ports, 2 + count * PORT_LEN)))
}

/// What is said about a session: the datagrams between one client of a UDP port, on the
/// host, and the server in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// From the host: it begins, with the server at this port.
    Open(Port),
    Datagram(Vec<u8>),
    /// Who says it has forgotten the session.
    End,
}

/// Something about a session.
///
/// On the wire: the session (four bytes), what is said (one), the length (two), then the
/// port or the datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub session: u32,
    pub said: Said,
}

/// Bytes of a frame before its content.
pub const FRAME_PREFIX_LEN: usize = 7;

impl Frame {
    /// # Errors
    /// A datagram that is too long for any protocol.
    pub fn encode(&self) -> Result<Vec<u8>, Malformed> {
        let port;
        let (kind, content): (u8, &[u8]) = match &self.said {
            Said::Open(to) => {
                port = to.encode();
                (0, &port)
            }
            Said::Datagram(bytes) => (1, bytes),
            Said::End => (2, &[]),
        };
        let len = u16::try_from(content.len()).map_err(|_| Malformed("datagram too long"))?;
        let mut wire = Vec::with_capacity(FRAME_PREFIX_LEN + content.len());
        wire.extend_from_slice(&self.session.to_le_bytes());
        wire.push(kind);
        wire.extend_from_slice(&len.to_le_bytes());
        wire.extend_from_slice(content);
        Ok(wire)
    }

    /// The first frame in these bytes, and how many of them it takes; `None` when it is
    /// not complete.
    ///
    /// # Errors
    /// Not a frame.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Frame, usize)>, Malformed> {
        let Some((prefix, rest)) = bytes.split_first_chunk() else {
            return Ok(None);
        };
        let len = Frame::content_len(*prefix);
        let Some(content) = rest.get(..len) else {
            return Ok(None);
        };
        let [s0, s1, s2, s3, kind, ..] = *prefix;
        let said = match (kind, content) {
            (0, port) => {
                let port = port.try_into().map_err(|_| Malformed("not a port"))?;
                Said::Open(Port::decode(port)?)
            }
            (1, bytes) => Said::Datagram(bytes.to_vec()),
            (2, []) => Said::End,
            _ => return Err(Malformed("unknown frame")),
        };
        let session = u32::from_le_bytes([s0, s1, s2, s3]);
        Ok(Some((Frame { session, said }, FRAME_PREFIX_LEN + len)))
    }

    /// How many bytes follow the prefix.
    #[must_use]
    pub fn content_len(prefix: [u8; FRAME_PREFIX_LEN]) -> usize {
        let [.., low, high] = prefix;
        usize::from(u16::from_le_bytes([low, high]))
    }
}

/// A message for a name server, or its answer.
///
/// On the wire: the number (four bytes), 1 for TCP or 0 for UDP, the length (two bytes),
/// the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    pub number: u32,
    pub is_tcp: bool,
    pub message: Vec<u8>,
}

/// Bytes of a query before the message.
pub const QUERY_PREFIX_LEN: usize = 7;

impl Query {
    /// # Errors
    /// A message longer than [`MAX_DNS_MESSAGE`].
    pub fn encode(&self) -> Result<Vec<u8>, Malformed> {
        let len = u16::try_from(self.message.len()).map_err(|_| Malformed("message too long"))?;
        let mut wire = self.number.to_le_bytes().to_vec();
        wire.push(u8::from(self.is_tcp));
        wire.extend_from_slice(&len.to_le_bytes());
        wire.extend_from_slice(&self.message);
        Ok(wire)
    }

    /// All but the message, whose length is returned with it.
    #[must_use]
    pub fn decode_prefix(prefix: [u8; QUERY_PREFIX_LEN]) -> (Query, usize) {
        let [n0, n1, n2, n3, tcp, low, high] = prefix;
        let query = Query {
            number: u32::from_le_bytes([n0, n1, n2, n3]),
            is_tcp: tcp != 0,
            message: Vec::new(),
        };
        (query, usize::from(u16::from_le_bytes([low, high])))
    }

    /// Reads one.
    ///
    /// # Errors
    /// The reader's.
    pub fn read(from: &mut impl Read) -> io::Result<Query> {
        let mut prefix = [0; QUERY_PREFIX_LEN];
        from.read_exact(&mut prefix)?;
        let (mut query, len) = Query::decode_prefix(prefix);
        query.message = vec![0; len];
        from.read_exact(&mut query.message)?;
        Ok(query)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(address: &str, number: u16) -> Port {
        Port {
            protocol: Protocol::Tcp,
            address: address.parse().unwrap(),
            number,
        }
    }

    fn udp(address: &str, number: u16) -> Port {
        Port {
            protocol: Protocol::Udp,
            ..port(address, number)
        }
    }

    #[test]
    fn a_request_survives_the_round_trip() {
        for purpose in [
            Purpose::Listeners,
            Purpose::Connect(port("fd00::1", 65_535)),
            Purpose::Connect(port("127.0.0.5", 80)),
            Purpose::Datagrams,
            Purpose::Resolve(Ipv4Addr::new(127, 0, 0, 11)),
        ] {
            let request = Request {
                purpose,
                container_id: "c".repeat(MAX_ID_LEN),
            };
            let wire = request.encode().unwrap();
            let (prefix, id) = wire.split_first_chunk().unwrap();
            assert_eq!(
                Request::decode_prefix(*prefix).unwrap(),
                (purpose, id.len())
            );
        }
    }

    #[test]
    fn what_is_not_a_request_is_refused() {
        let good = Request {
            purpose: Purpose::Resolve(Ipv4Addr::new(127, 0, 0, 11)),
            container_id: "c".into(),
        };
        let good = *good.encode().unwrap().first_chunk().unwrap();
        for (at, byte) in [(0, b'X'), (4, 4), (5, 10), (REQUEST_PREFIX_LEN - 1, 0)] {
            let mut wrong: [u8; REQUEST_PREFIX_LEN] = good;
            wrong[at] = byte;
            assert!(Request::decode_prefix(wrong).is_err(), "{at}");
        }
        let long = Request {
            purpose: Purpose::Listeners,
            container_id: "c".repeat(MAX_ID_LEN + 1),
        };
        assert!(long.encode().is_err());
    }

    #[test]
    fn ports_survive_the_round_trip_and_have_a_bound() {
        let ports: BTreeSet<_> = [
            port("0.0.0.0", 80),
            port("::", 80),
            udp("10.0.2.100", 80),
            port("127.0.0.1", 8080),
        ]
        .into();
        let mut wire = encode_ports(&ports);
        let len = wire.len();
        assert_eq!(decode_ports(&wire[..len - 1]).unwrap(), None);
        assert_eq!(decode_ports(&wire[..1]).unwrap(), None);
        wire.extend([0, 0]);
        assert_eq!(decode_ports(&wire).unwrap(), Some((ports, len)));
        let many: BTreeSet<_> = (1..1000).map(|n| port("::1", n)).collect();
        let (some, _) = decode_ports(&encode_ports(&many)).unwrap().unwrap();
        assert_eq!(some.len(), MAX_PORTS);
        assert!(decode_ports(&[1, 2]).is_err());
        let good = encode_ports(&[udp("10.0.2.100", 80)].into());
        assert!(decode_ports(&good).is_ok());
        for (at, byte) in [(2, 2), (3, 5), (20, 0)] {
            let mut wrong = good.clone();
            wrong[at] = byte;
            assert!(decode_ports(&wrong).is_err(), "{at}");
        }
    }

    #[test]
    fn addresses_that_are_not_a_containers_are_not_served() {
        for (address, expected) in [
            ("0.0.0.0", true),
            ("127.0.0.1", true),
            ("127.0.0.11", false),
            ("10.0.2.100", true),
            ("224.0.0.1", false),
            ("255.255.255.255", false),
            ("::", true),
            ("::1", true),
            ("fd00::1", true),
            ("fe80::1", false),
            ("ff02::1", false),
            ("::ffff:127.0.0.11", false),
        ] {
            assert_eq!(port(address, 80).is_served(), expected, "{address}");
            let told = decode_ports(&encode_ports(&[udp(address, 80)].into()));
            assert_eq!(told.is_ok(), expected, "{address}");
        }
    }

    #[test]
    fn frames_survive_the_round_trip() {
        for said in [
            Said::Open(udp("fd00::1", 53)),
            Said::Datagram(vec![7; 65_535]),
            Said::Datagram(Vec::new()),
            Said::End,
        ] {
            let frame = Frame {
                session: 0x0102_0304,
                said,
            };
            let mut wire = frame.encode().unwrap();
            let len = wire.len();
            assert_eq!(Frame::decode(&wire[..len - 1]).unwrap(), None);
            wire.push(1);
            assert_eq!(Frame::decode(&wire).unwrap(), Some((frame, len)));
        }
        let long = Frame {
            session: 1,
            said: Said::Datagram(vec![0; 65_536]),
        };
        assert!(long.encode().is_err());
        for wrong in [[0, 0, 0, 0, 3, 0, 0], [0, 0, 0, 0, 0, 0, 0]] {
            assert!(Frame::decode(&wrong).is_err());
        }
        assert!(Frame::decode(&[0, 0, 0, 0, 2, 1, 0, 9]).is_err());
    }

    #[test]
    fn a_query_survives_the_round_trip() {
        let query = Query {
            number: 0x0102_0304,
            is_tcp: true,
            message: vec![7; MAX_DNS_MESSAGE],
        };
        let wire = query.encode().unwrap();
        assert_eq!(Query::read(&mut wire.as_slice()).unwrap(), query);
        assert!(Query::read(&mut &wire[..wire.len() - 1]).is_err());
    }
}
