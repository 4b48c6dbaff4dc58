//! Which TCP ports of a container's loopback interface are listened on.
//!
//! The kernel tells of no listening socket, but it asks a program about each: one of
//! type BPF_PROG_TYPE_SOCK_OPS at the cgroup of all containers, which has the agent
//! woken when a socket begins to listen or one that listened is closed. The sockets
//! there are then read from proc_pid_net(5).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use kuasar_runv_protocol::loopback::{Answer, Port, encode_ports};
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
    /// The program is attached while this is open.
    _link: OwnedFd,
}

impl Changes {
    /// # Errors
    /// Of bpf(2).
    pub async fn watch() -> io::Result<Changes> {
        let signal = bpf::Signal::new()?;
        let program = bpf::load(bpf::SOCK_OPS, &program(signal.fd().as_raw_fd()))?;
        let link = bpf::link(bpf::SOCK_OPS, &program, &root_cgroup()?)?;
        let (sender, count) = watch::channel(0);
        let ready = sys::on_runtime(signal.fd().try_clone()?, Interest::READABLE)?;
        sys::spawn(async move {
            while let Ok(mut guard) = ready.readable().await {
                guard.clear_ready();
                signal.reset();
                sender.send_modify(|count| *count += 1);
            }
        });
        Ok(Changes { count, _link: link })
    }
}

/// Wakes the reader of a ring buffer when a socket begins to listen, and asks to be
/// asked when it changes its state; then when its old state was listening.
fn program(ring: RawFd) -> Vec<Insn> {
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
        insn(STORE_LONG_IMM, R_FRAME, 0, -8, 0),
    ];
    program.extend(load_map(R_CONTEXT, ring));
    program.extend([
        insn(MOVE_LONG_REG, 2, R_FRAME, 0, 0),
        insn(ADD_LONG_IMM, 2, 0, 0, (-8i32).cast_unsigned()),
        insn(MOVE_IMM, 3, 0, 0, 8),
        insn(MOVE_IMM, 4, 0, 0, 0),
        insn(CALL, 0, 0, 0, FN_RINGBUF_OUTPUT),
        insn(MOVE_IMM, R_RESULT, 0, 0, 1),
        insn(EXIT, 0, 0, 0, 0),
    ]);
    program
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
    for file in ["tcp", "tcp6"] {
        let file = match File::open(format!("/proc/thread-self/net/{file}")) {
            // A kernel without IPv6.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        for line in BufReader::new(file.take(MAX_FILE)).lines().skip(1) {
            // Those that listen come first.
            match listener(&line?) {
                Some(found) => ports.extend(found),
                None => break,
            }
        }
    }
    Ok(ports)
}

/// The ports at which a listening socket is reached; `None` if it does not listen.
fn listener(line: &str) -> Option<Vec<Port>> {
    /// TCP_LISTEN.
    const LISTEN: &str = "0A";
    let mut fields = line.split_whitespace().skip(1);
    let (local, state) = (fields.next()?, fields.nth(1)?);
    if state != LISTEN {
        return None;
    }
    let (address, port) = local.split_once(':')?;
    let number = u16::from_str_radix(port, 16).ok()?;
    let families: &[bool] = match address.len() {
        8 => match Ipv4Addr::from(octets(address)?) {
            Ipv4Addr::LOCALHOST | Ipv4Addr::UNSPECIFIED => &[false],
            _ => &[],
        },
        32 => {
            let mut all = [0; 16];
            for (word, text) in all.chunks_exact_mut(4).zip(address.as_bytes().chunks(8)) {
                word.copy_from_slice(&octets(std::str::from_utf8(text).ok()?)?);
            }
            let address = Ipv6Addr::from(all);
            match (address, address.to_ipv4_mapped()) {
                // Nearly always for both; if not, connecting fails.
                (Ipv6Addr::UNSPECIFIED, _) => &[false, true],
                (Ipv6Addr::LOCALHOST, _) => &[true],
                (_, Some(Ipv4Addr::LOCALHOST | Ipv4Addr::UNSPECIFIED)) => &[false],
                _ => &[],
            }
        }
        _ => return None,
    };
    let port = |is_v6: &bool| Port {
        is_v6: *is_v6,
        number,
    };
    Some(families.iter().map(port).collect())
}

/// Four bytes of an address, which the kernel prints as one number.
fn octets(text: &str) -> Option<[u8; 4]> {
    u32::from_str_radix(text, 16).ok().map(u32::to_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn addresses_are_those_of_the_loopback_interface() {
        let ports = |address: &str, state: &str| {
            let line = format!("  0: {address}:1F90 00000000:0000 {state} 00000000:00000000 00");
            let families = |ports: Vec<Port>| ports.iter().map(|p| p.is_v6).collect::<Vec<_>>();
            listener(&line).map(families)
        };
        let zero = "00000000".repeat(4);
        for (address, expected) in [
            ("0100007F", vec![false]),
            ("00000000", vec![false]),
            ("0B00007F", vec![]),
            ("0501A8C0", vec![]),
            (zero.as_str(), vec![false, true]),
            ("00000000000000000000000001000000", vec![true]),
            ("0000000000000000FFFF00000100007F", vec![false]),
            ("000080FE00000000FF005450B6AF4AFE", vec![]),
        ] {
            assert_eq!(ports(address, "0A"), Some(expected), "{address}");
            assert_eq!(ports(address, "01"), None);
        }
        assert_eq!(listener("nonsense"), None);
    }

    #[test]
    fn sockets_that_listen_are_found() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = Port {
            is_v6: false,
            number: socket.local_addr().unwrap().port(),
        };
        assert!(listening().unwrap().contains(&port));
        drop(socket);
        assert!(!listening().unwrap().contains(&port));
    }
}
