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
//! - [`Purpose::Resolve`]: [`Query`]s for a name server, from the guest, and as the
//!   answers the same the other way, with the number of the query and nothing in those
//!   that failed.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::stream::{MAX_ID_LEN, Malformed};

/// First bytes of every connection.
const MAGIC: [u8; 4] = *b"RVL1";
/// The port of name servers.
pub const DNS_PORT: u16 = 53;
/// Most ports of a container that are connected.
pub const MAX_PORTS: usize = 256;
/// Longest message of a name server, in bytes.
pub const MAX_DNS_MESSAGE: usize = 65_535;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Listeners,
    Connect(Port),
    /// Serve this address of the loopback network as a name server.
    Resolve(Ipv4Addr),
}

/// A TCP port of the loopback interface, at 127.0.0.1 or at ::1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    pub is_v6: bool,
    pub number: u16,
}

impl Port {
    /// Where it is found in its network namespace.
    #[must_use]
    pub fn address(self) -> SocketAddr {
        let address: IpAddr = match self.is_v6 {
            true => Ipv6Addr::LOCALHOST.into(),
            false => Ipv4Addr::LOCALHOST.into(),
        };
        SocketAddr::new(address, self.number)
    }
}

/// The first bytes of a connection: [`MAGIC`], the purpose, four bytes of its argument,
/// the length of the container id, the id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub purpose: Purpose,
    pub container_id: String,
}

/// Bytes of a request before the id.
pub const REQUEST_PREFIX_LEN: usize = MAGIC.len() + 6;

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
        let (kind, argument) = match self.purpose {
            Purpose::Listeners => (0, [0; 4]),
            Purpose::Connect(port) => {
                let [low, high] = port.number.to_le_bytes();
                (1, [low, high, u8::from(port.is_v6), 0])
            }
            Purpose::Resolve(address) => (2, address.octets()),
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
        let [m0, m1, m2, m3, kind, a, b, c, d, len] = prefix;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(Malformed("wrong magic"));
        }
        let purpose = match kind {
            0 => Purpose::Listeners,
            1 => Purpose::Connect(Port {
                is_v6: c != 0,
                number: u16::from_le_bytes([a, b]),
            }),
            2 => {
                let address = Ipv4Addr::new(a, b, c, d);
                if !address.is_loopback() {
                    return Err(Malformed("not an address of the loopback network"));
                }
                Purpose::Resolve(address)
            }
            _ => return Err(Malformed("unknown purpose")),
        };
        if len == 0 {
            return Err(Malformed("empty container id"));
        }
        Ok((purpose, usize::from(len)))
    }
}

/// A set of ports: their number (two bytes), then for each four or six, and the port.
/// Those beyond [`MAX_PORTS`] are left out.
#[must_use]
pub fn encode_ports(ports: &BTreeSet<Port>) -> Vec<u8> {
    let count = ports.len().min(MAX_PORTS);
    // The bound above is far below u16::MAX.
    let mut wire = (count as u16).to_le_bytes().to_vec();
    for port in ports.iter().take(count) {
        wire.push(if port.is_v6 { 6 } else { 4 });
        wire.extend_from_slice(&port.number.to_le_bytes());
    }
    wire
}

/// The first set of ports in these bytes, and how many of them it takes; `None` when it
/// is not complete.
///
/// # Errors
/// Not a set of ports.
pub fn decode_ports(bytes: &[u8]) -> Result<Option<(BTreeSet<Port>, usize)>, Malformed> {
    let Some((count, rest)) = bytes.split_first_chunk::<2>() else {
        return Ok(None);
    };
    let count = usize::from(u16::from_le_bytes(*count));
    if count > MAX_PORTS {
        return Err(Malformed("too many ports"));
    }
    let Some(entries) = rest.get(..count * 3) else {
        return Ok(None);
    };
    let mut ports = BTreeSet::new();
    for entry in entries.chunks_exact(3) {
        let is_v6 = match entry[0] {
            4 => false,
            6 => true,
            _ => return Err(Malformed("unknown address family")),
        };
        let number = u16::from_le_bytes([entry[1], entry[2]]);
        if number == 0 {
            return Err(Malformed("port 0"));
        }
        ports.insert(Port { is_v6, number });
    }
    Ok(Some((ports, 2 + count * 3)))
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

    fn port(is_v6: bool, number: u16) -> Port {
        Port { is_v6, number }
    }

    #[test]
    fn a_request_survives_the_round_trip() {
        for purpose in [
            Purpose::Listeners,
            Purpose::Connect(port(true, 65_535)),
            Purpose::Connect(port(false, 80)),
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
        for (at, byte) in [(0, b'X'), (4, 3), (5, 10), (9, 0)] {
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
        let ports: BTreeSet<_> = [port(false, 80), port(true, 80), port(false, 8080)].into();
        let mut wire = encode_ports(&ports);
        let len = wire.len();
        assert_eq!(decode_ports(&wire[..len - 1]).unwrap(), None);
        assert_eq!(decode_ports(&wire[..1]).unwrap(), None);
        wire.extend([0, 0]);
        assert_eq!(decode_ports(&wire).unwrap(), Some((ports, len)));
        let many: BTreeSet<_> = (1..1000).map(|n| port(false, n)).collect();
        let (some, _) = decode_ports(&encode_ports(&many)).unwrap().unwrap();
        assert_eq!(some.len(), MAX_PORTS);
        assert!(decode_ports(&[1, 2]).is_err());
        assert!(decode_ports(&[1, 0, 5, 80, 0]).is_err());
        assert!(decode_ports(&[1, 0, 4, 0, 0]).is_err());
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
