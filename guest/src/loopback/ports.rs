//! Which ports of a container are listened on: by TCP, or by UDP sockets that are bound
//! and not connected.
//!
//! The kernel tells of no such socket, but it asks programs about each, at the cgroup of
//! all containers, which have the agent woken: one of type BPF_PROG_TYPE_SOCK_OPS when a
//! TCP socket begins to listen or one that listened is closed, and of type
//! BPF_PROG_TYPE_CGROUP_SOCK when a UDP socket has been bound or one that is not
//! connected is closed. The sockets there are then read from proc_pid_net(5).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use kuasar_runv_protocol::loopback::{Answer, Port, Protocol, encode_ports};
use tokio::io::Interest;
use tokio::sync::watch;
use tokio::time::sleep;

use super::{answer, in_namespace, root_cgroup};
use crate::bpf::{
    self, ADD_LONG_IMM, CALL, EXIT, FN_RINGBUF_OUTPUT, FN_SOCK_OPS_CB_FLAGS_SET, Insn, JUMP,
    JUMP_EQ_IMM, JUMP_NE_IMM, LOAD_WORD, MOVE_IMM, MOVE_LONG_REG, R_CONTEXT, R_FRAME, R_RESULT,
    STORE_LONG_IMM, insn, load_map,
};
use crate::streams::Connection;
use crate::sys;

/// Time between two looks: servers open several sockets in a row, and a program is
/// asked just before what it is asked about happens.
const CALM: Duration = Duration::from_millis(20);
/// Most bytes that are read of a file: some 600 sockets.
const MAX_FILE: u64 = 96 * 1024;

/// Says when sockets may have begun or ceased to listen, in any container.
pub struct Changes {
    count: watch::Receiver<u64>,
    /// The programs are attached while these are open.
    _links: Vec<OwnedFd>,
}

impl Changes {
    /// # Errors
    /// Of bpf(2).
    pub async fn watch() -> io::Result<Changes> {
        let signal = bpf::Signal::new()?;
        let ring = signal.fd().as_raw_fd();
        let cgroup = root_cgroup()?;
        let links = [
            (bpf::SOCK_OPS, of_listening(ring)),
            (bpf::INET4_POST_BIND, of_binding(ring)),
            (bpf::INET6_POST_BIND, of_binding(ring)),
            (bpf::INET_SOCK_RELEASE, of_closing(ring)),
        ]
        .map(|(hook, program)| {
            let program = bpf::load(hook, &program)?;
            bpf::link(hook, &program, &cgroup)
        });
        let links = links.into_iter().collect::<io::Result<_>>()?;
        let (sender, count) = watch::channel(0);
        let ready = sys::on_runtime(signal.fd().try_clone()?, Interest::READABLE)?;
        sys::spawn(async move {
            while let Ok(mut guard) = ready.readable().await {
                guard.clear_ready();
                signal.reset();
                sender.send_modify(|count| *count += 1);
            }
        });
        Ok(Changes {
            count,
            _links: links,
        })
    }
}

/// Wakes the reader of a ring buffer when a socket begins to listen, and asks to be
/// asked when it changes its state; then when its old state was listening.
fn of_listening(ring: RawFd) -> Vec<Insn> {
    // `struct bpf_sock_ops` has what is asked, and its first argument, at these places.
    const OPERATION: i16 = 0;
    const ARGUMENT: i16 = 4;
    const STATE: u32 = 10;
    const LISTEN: u32 = 11;
    const WANT_STATE: u32 = 4;
    const TCP_LISTEN: u32 = 10;
    const R_SELF: u8 = 6;
    let mut program = vec![
        insn(MOVE_LONG_REG, R_SELF, R_CONTEXT, 0, 0),
        insn(LOAD_WORD, 2, R_SELF, OPERATION, 0),
        insn(JUMP_EQ_IMM, 2, 0, 4, LISTEN),
        insn(JUMP_NE_IMM, 2, 0, 14, STATE),
        insn(LOAD_WORD, 2, R_SELF, ARGUMENT, 0),
        insn(JUMP_EQ_IMM, 2, 0, 4, TCP_LISTEN),
        insn(JUMP, 0, 0, 11, 0),
        insn(MOVE_LONG_REG, R_CONTEXT, R_SELF, 0, 0),
        insn(MOVE_IMM, 2, 0, 0, WANT_STATE),
        insn(CALL, 0, 0, 0, FN_SOCK_OPS_CB_FLAGS_SET),
    ];
    program.extend(wake(ring));
    program.extend(allow());
    program
}

/// Wakes the reader when a UDP socket has been bound.
fn of_binding(ring: RawFd) -> Vec<Insn> {
    of_datagrams(ring, &[])
}

/// Wakes the reader when a UDP socket that is not connected is closed.
fn of_closing(ring: RawFd) -> Vec<Insn> {
    /// `dst_port` of `struct bpf_sock`.
    const PEER_PORT: i16 = 48;
    // The jump is over what wakes.
    let is_connected = [
        insn(LOAD_WORD, 2, R_CONTEXT, PEER_PORT, 0),
        insn(JUMP_NE_IMM, 2, 0, WAKE_LEN, 0),
    ];
    of_datagrams(ring, &is_connected)
}

/// Wakes the reader for a UDP socket unless `and` jumps over it.
fn of_datagrams(ring: RawFd, and: &[Insn]) -> Vec<Insn> {
    /// `protocol` of `struct bpf_sock`.
    const PROTOCOL: i16 = 12;
    let others = and.len() as i16 + WAKE_LEN;
    let mut program = vec![
        insn(LOAD_WORD, 2, R_CONTEXT, PROTOCOL, 0),
        insn(JUMP_NE_IMM, 2, 0, others, libc::IPPROTO_UDP as u32),
    ];
    program.extend(and);
    program.extend(wake(ring));
    program.extend(allow());
    program
}

/// Instructions of [`wake`].
const WAKE_LEN: i16 = 8;

/// Puts something into the ring buffer.
fn wake(ring: RawFd) -> [Insn; WAKE_LEN as usize] {
    let [map, map_end] = load_map(R_CONTEXT, ring);
    [
        insn(STORE_LONG_IMM, R_FRAME, 0, -8, 0),
        map,
        map_end,
        insn(MOVE_LONG_REG, 2, R_FRAME, 0, 0),
        insn(ADD_LONG_IMM, 2, 0, 0, (-8i32).cast_unsigned()),
        insn(MOVE_IMM, 3, 0, 0, 8),
        insn(MOVE_IMM, 4, 0, 0, 0),
        insn(CALL, 0, 0, 0, FN_RINGBUF_OUTPUT),
    ]
}

/// Never a no.
fn allow() -> [Insn; 2] {
    [insn(MOVE_IMM, R_RESULT, 0, 0, 1), insn(EXIT, 0, 0, 0, 0)]
}

/// Tells the host, now and whenever there is news, until it hangs up.
///
/// # Errors
/// Of the connection, and of reading which sockets there are.
pub async fn tell(
    connection: &Connection,
    namespace: OwnedFd,
    changes: &Changes,
) -> io::Result<()> {
    let mut changes = changes.count.clone();
    answer(connection, Answer::Yes).await?;
    let mut told = None;
    loop {
        changes.borrow_and_update();
        let ports = in_namespace(namespace.try_clone()?, listening).await?;
        if told.as_ref() != Some(&ports) {
            connection.write_all(&encode_ports(&ports)).await?;
            told = Some(ports);
        }
        let mut nothing = [0];
        tokio::select! {
            changed = changes.changed() => changed.map_err(io::Error::other)?,
            // The host says nothing more.
            _ = connection.read(&mut nothing) => return Ok(()),
        }
        sleep(CALM).await;
    }
}

/// The ports that are listened on in the network namespace of the calling thread.
fn listening() -> io::Result<BTreeSet<Port>> {
    let mut ports = BTreeSet::new();
    for (file, protocol) in [
        ("tcp", Protocol::Tcp),
        ("tcp6", Protocol::Tcp),
        ("udp", Protocol::Udp),
        ("udp6", Protocol::Udp),
    ] {
        let file = match File::open(format!("/proc/thread-self/net/{file}")) {
            // A kernel without IPv6.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        for line in BufReader::new(file.take(MAX_FILE)).lines().skip(1) {
            match (listener(protocol, &line?), protocol) {
                (Some(found), _) => ports.extend(found),
                // Those that listen come first.
                (None, Protocol::Tcp) => break,
                (None, Protocol::Udp) => {}
            }
        }
    }
    Ok(ports)
}

/// The ports at which a listening socket is reached; `None` if it does not listen.
fn listener(protocol: Protocol, line: &str) -> Option<Vec<Port>> {
    let mut fields = line.split_whitespace().skip(1);
    let (local, peer, state) = (fields.next()?, fields.next()?, fields.next()?);
    let (address, port) = local.split_once(':')?;
    let listens = match protocol {
        // TCP_LISTEN.
        Protocol::Tcp => state == "0A",
        Protocol::Udp => peer.bytes().all(|b| matches!(b, b'0' | b':')),
    };
    if !listens {
        return None;
    }
    let number = u16::from_str_radix(port, 16).ok()?;
    let addresses: Vec<IpAddr> = match address.len() {
        8 => vec![Ipv4Addr::from(octets(address)?).into()],
        32 => {
            let mut all = [0; 16];
            for (word, text) in all.chunks_exact_mut(4).zip(address.as_bytes().chunks(8)) {
                word.copy_from_slice(&octets(std::str::from_utf8(text).ok()?)?);
            }
            match Ipv6Addr::from(all) {
                // Nearly always for both; if not, connecting fails.
                any @ Ipv6Addr::UNSPECIFIED => vec![Ipv4Addr::UNSPECIFIED.into(), any.into()],
                address => vec![address.to_canonical()],
            }
        }
        _ => return None,
    };
    let port = |address| Port {
        protocol,
        address,
        number,
    };
    let served = addresses.into_iter().map(port).filter(|p| p.is_served());
    Some(served.collect())
}

/// Four bytes of an address, which the kernel prints as one number.
fn octets(text: &str) -> Option<[u8; 4]> {
    u32::from_str_radix(text, 16).ok().map(u32::to_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn addresses_are_those_others_reach() {
        let ports = |protocol, address: &str, peer: &str, state: &str| {
            let line = format!("  0: {address}:1F90 {peer} {state} 00000000:00000000 00");
            listener(protocol, &line).map(|ports| {
                assert!(
                    ports
                        .iter()
                        .all(|p| (p.protocol, p.number) == (protocol, 8080))
                );
                let addresses = ports.iter().map(|port| port.address.to_string());
                addresses.collect::<Vec<_>>()
            })
        };
        let zero = "00000000".repeat(4);
        for (address, expected) in [
            ("0100007F", vec!["127.0.0.1"]),
            ("00000000", vec!["0.0.0.0"]),
            ("0B00007F", vec![]),
            ("0501A8C0", vec!["192.168.1.5"]),
            (zero.as_str(), vec!["0.0.0.0", "::"]),
            ("00000000000000000000000001000000", vec!["::1"]),
            ("0000000000000000FFFF00000100007F", vec!["127.0.0.1"]),
            ("0000000000000000FFFF00000B00007F", vec![]),
            ("000080FE00000000FF005450B6AF4AFE", vec![]),
        ] {
            let expected = Some(expected.into_iter().map(str::to_owned).collect());
            let peer = format!("{}:0000", "0".repeat(address.len()));
            assert_eq!(ports(Protocol::Tcp, address, &peer, "0A"), expected);
            assert_eq!(ports(Protocol::Udp, address, &peer, "07"), expected);
            assert_eq!(ports(Protocol::Tcp, address, &peer, "01"), None);
        }
        let connected = ports(Protocol::Udp, "0100007F", "0100007F:0035", "01");
        assert_eq!(connected, None);
        assert_eq!(listener(Protocol::Tcp, "nonsense"), None);
    }

    #[test]
    fn sockets_that_listen_are_found() {
        let port = |protocol, address: std::net::SocketAddr| Port {
            protocol,
            address: address.ip(),
            number: address.port(),
        };
        let listens = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = port(Protocol::Tcp, listens.local_addr().unwrap());
        let bound = UdpSocket::bind("127.0.0.1:0").unwrap();
        let udp = port(Protocol::Udp, bound.local_addr().unwrap());
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect(udp.socket_address()).unwrap();
        let client = port(Protocol::Udp, connected.local_addr().unwrap());
        let found = listening().unwrap();
        assert!(found.contains(&tcp) && found.contains(&udp));
        assert!(!found.contains(&client));
        drop((listens, bound));
        let found = listening().unwrap();
        assert!(!found.contains(&tcp) && !found.contains(&udp));
    }

    /// Programs about UDP sockets end with yes whatever they are asked.
    #[test]
    fn jumps_of_the_programs_end_behind_what_wakes() {
        for program in [of_binding(3), of_closing(3)] {
            let wakes = program.len() - 2 - WAKE_LEN as usize;
            assert_eq!(program[wakes..][..WAKE_LEN as usize], wake(3));
            assert_eq!(program[program.len() - 2..], allow());
            for (at, jump) in program[..wakes].iter().enumerate() {
                if jump.code == JUMP_NE_IMM {
                    assert_eq!(at + 1 + jump.off as usize, program.len() - 2);
                }
            }
        }
    }
}
