//! The socket device for [`crate::fuzzing`]: for drivers that say anything
//! ([`Sockets`]), and for guests that speak its protocol, well or not ([`packets`]).

mod stream;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use super::device::Device;
use super::packet::{HEADER_LEN, Header, op};
use super::tests::guest::{CID, Vm};
use super::vhost_user::Backend;
use crate::fuzzing::Input;
use crate::sys::unix_socket;
use crate::vm::devices::vhost_user::Status;

use self::stream::Streams;

/// The port of the host that somebody listens on.
const LISTENED: u32 = 2;
/// The first port of the host's own ends.
const FIRST_CLIENT: u32 = 1 << 30;
/// Most steps of an input.
const MAX_STEPS: usize = 300;
const MAX_CLIENTS: usize = 16;
/// Packets that wait for buffers and belong to no connection, and what one packet or a
/// reset may add to them.
const MAX_WAITING: usize = 256 + 64;

/// A device, its directory, and what connects to it there.
pub struct Sockets {
    pub backend: Arc<Backend>,
    pub status: Arc<Status>,
    root: tempfile::TempDir,
    listener: UnixListener,
    clients: Vec<UnixStream>,
}

impl Sockets {
    pub fn new() -> Sockets {
        let root = tempfile::tempdir().expect("a directory");
        let dir = File::open(root.path()).expect("a directory");
        let listener = unix_socket::bind(&dir, &format!("vsock.sock_{LISTENED}"));
        let listener = listener.expect("a socket");
        listener.set_nonblocking(true).expect("a socket");
        let device = Device::new(CID, dir.into()).expect("a device");
        let status = Status::new().expect("a descriptor");
        Sockets {
            backend: Backend::new(device, status.clone()).expect("a descriptor"),
            status,
            root,
            listener,
            clients: Vec::new(),
        }
    }

    /// What a process of the host does.
    pub fn host(&mut self, input: &mut Input<'_>) {
        let how = input.byte();
        let client = match self.clients.len() {
            0 => None,
            count => Some(usize::from(how >> 3) % count),
        };
        match (how & 7, client) {
            (0 | 1, _) if self.clients.len() < MAX_CLIENTS => {
                let dir = File::open(self.root.path()).expect("a directory");
                let connected = unix_socket::connect(&dir, "vsock.sock");
                let mut client = connected.expect("the device listens");
                client.set_nonblocking(true).expect("a socket");
                let line = match how >> 3 {
                    0 => input.bytes(24).to_vec(),
                    port => format!("CONNECT {port}\nmore").into_bytes(),
                };
                let _ = client.write(&line);
                self.clients.push(client);
            }
            (2, Some(client)) => {
                let len = usize::from(input.u16());
                let _ = (&self.clients[client]).write(&vec![1; len]);
            }
            (3 | 4, Some(client)) => {
                let _ = (&self.clients[client]).read(&mut vec![0; 65536]);
            }
            (5, Some(client)) => drop(self.clients.swap_remove(client)),
            (6, Some(client)) => {
                let _ = self.clients[client].shutdown(std::net::Shutdown::Write);
            }
            _ if self.clients.len() < MAX_CLIENTS => {
                if let Ok((client, _)) = self.listener.accept() {
                    client.set_nonblocking(true).expect("a socket");
                    self.clients.push(client);
                }
            }
            _ => {}
        }
    }

    /// The machine ends, and the host takes nothing any more.
    pub fn end(&mut self) {
        self.clients.clear();
        while self.listener.accept().is_ok() {}
        self.backend.finish();
        self.status.assert_works();
    }
}

/// Headers of packets in buffers of their length, most of them to the point.
pub fn content(input: &mut Input<'_>, len: usize) -> Vec<u8> {
    let how = input.byte();
    if len < HEADER_LEN || how & 0x80 != 0 {
        return input.bytes(len).to_vec();
    }
    let ports = input.byte();
    let header = Header {
        src_cid: CID + u64::from(how >> 6 & 1),
        dst_cid: 2,
        src_port: u32::from(ports & 7),
        dst_port: match ports >> 6 {
            0 => LISTENED,
            _ => FIRST_CLIENT + u32::from(ports >> 3 & 7),
        },
        len: match how & 3 {
            0 => 0,
            1 => u32::from(input.byte()),
            2 => (len - HEADER_LEN) as u32,
            _ => input.u32(),
        },
        kind: 1 + u16::from(how >> 2 & 15 == 15),
        op: u16::from(input.byte() % 9),
        flags: u32::from(input.byte() & 3),
        buf_alloc: match how >> 5 & 1 {
            0 => 1 << 16,
            _ => input.u32(),
        },
        fwd_cnt: u32::from(input.byte()),
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend(input.bytes(len - HEADER_LEN));
    bytes
}

/// A guest and clients that make connections, move bytes, and end them in any order, by
/// the rules until the input says otherwise. Bytes arrive as they were sent, and nobody
/// gets more than was allowed.
pub fn packets(input: &[u8]) {
    let mut input = Input::new(input);
    let mut vm = Vm::new();
    let listener = vm.listen(LISTENED);
    listener.set_nonblocking(true).expect("a socket");
    let mut streams = Streams::default();
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        match input.byte() % 16 {
            0 | 1 => streams.connect(&mut vm, &mut input),
            2 | 3 => streams.write(&mut input),
            4 | 5 => streams.read(&mut input),
            6 => streams.leave(&mut input),
            7 => streams.open(&mut vm, &mut input),
            8 => streams.accept(&listener),
            9 => streams.answer(&mut vm, &mut input),
            10..13 => streams.send(&mut vm, &mut input),
            13 => streams.shut_down(&mut vm, &mut input),
            14 => streams.break_rules(&mut vm, &mut input),
            _ => match input.byte() {
                0xd1 => {
                    vm.device.reset();
                    streams.forget_all();
                }
                0xd2 => {
                    vm.device.expire_all();
                    streams.distrust_all();
                }
                how => vm.refill = how & 3 != 0,
            },
        }
        vm.run();
        while let Some((header, payload)) = vm.pop() {
            streams.packet(&header, &payload);
        }
        let (replies, turns) = vm.device.waiting();
        assert!(replies <= MAX_WAITING, "{replies} packets wait");
        assert!(turns <= vm.device.connections(), "{turns} turns");
    }
    drop(streams);
    drop(listener);
    vm.device.finish();
    assert_eq!(vm.device.connections(), 0);
}

/// A packet that only ends what was there.
fn reset(header: Header) -> Header {
    Header {
        op: op::RST,
        ..header
    }
}
