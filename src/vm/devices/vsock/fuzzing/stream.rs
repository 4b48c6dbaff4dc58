//! What both ends of connections know of them, to compare it with what the device does.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use super::super::packet::{Header, op, shutdown};
use super::super::tests::guest::{Peer, Vm};
use super::{FIRST_CLIENT, LISTENED, reset};
use crate::fuzzing::Input;
use crate::sys::unix_socket;

/// Most connections.
const MAX: usize = 8;
/// What the guest has room for.
const ROOM: u32 = 64 * 1024;
/// Longest piece.
const PIECE: usize = 0x8000;

/// One of the two ways of a connection.
#[derive(Default)]
struct Way {
    sent: u64,
    arrived: u64,
}

impl Way {
    /// Every byte is known by its place.
    fn byte(place: u64) -> u8 {
        (place.wrapping_mul(0x9e37_79b9) >> 16) as u8
    }

    fn piece(&self, len: usize) -> Vec<u8> {
        (self.sent..).take(len).map(Way::byte).collect()
    }

    fn arrive(&mut self, bytes: &[u8]) {
        for byte in bytes {
            assert!(self.arrived < self.sent, "more than was sent");
            assert_eq!(*byte, Way::byte(self.arrived), "at {}", self.arrived);
            self.arrived += 1;
        }
    }
}

struct Stream {
    /// The host's end, once it is known and as long as it is there.
    socket: Option<UnixStream>,
    ports: (u32, u32),
    to_host: Way,
    to_guest: Way,
    /// What the device has said of its room.
    room: (u32, u32),
    /// The guest may send.
    is_open: bool,
    /// Nobody has broken a rule, so all the others can be relied on.
    is_fair: bool,
    /// The line that answers CONNECT has not come yet.
    line_due: bool,
}

/// All connections.
#[derive(Default)]
pub struct Streams {
    /// Clients whose request the guest has not seen.
    clients: VecDeque<(UnixStream, Way)>,
    streams: Vec<Stream>,
    /// Opened by the guest, and not accepted yet.
    waiting: VecDeque<(u32, u32)>,
    next_port: u32,
}

impl Streams {
    fn pick(&mut self, input: &mut Input<'_>) -> Option<&mut Stream> {
        let number = input.below(MAX);
        let count = self.streams.len();
        self.streams.get_mut(number % count.max(1))
    }

    fn is_full(&self) -> bool {
        self.streams.len() + self.clients.len() + self.waiting.len() >= MAX
    }

    /// A client of the host connects, and may be in a hurry.
    pub fn connect(&mut self, vm: &mut Vm, input: &mut Input<'_>) {
        if self.is_full() {
            return;
        }
        let dir = File::open(vm.root.path()).expect("a directory");
        let mut socket = unix_socket::connect(&dir, "vsock.sock").expect("the device listens");
        socket.set_nonblocking(true).expect("a socket");
        let mut way = Way::default();
        let mut bytes = b"CONNECT 1024\n".to_vec();
        let ahead = way.piece(usize::from(input.byte()));
        bytes.extend(&ahead);
        // An empty socket takes it all.
        assert_eq!(socket.write(&bytes).expect("room"), bytes.len());
        way.sent = ahead.len() as u64;
        self.clients.push_back((socket, way));
    }

    /// The host sends.
    pub fn write(&mut self, input: &mut Input<'_>) {
        let len = usize::from(input.u16()) % PIECE;
        let Some(stream) = self.pick(input) else {
            return;
        };
        let bytes = stream.to_guest.piece(len);
        if let Some(mut socket) = stream.socket.as_ref()
            && let Ok(count) = socket.write(&bytes)
        {
            stream.to_guest.sent += count as u64;
        }
    }

    /// The host takes what there is.
    pub fn read(&mut self, input: &mut Input<'_>) {
        let len = usize::from(input.u16()) % PIECE;
        let Some(stream) = self.pick(input) else {
            return;
        };
        stream.take(len);
    }

    /// A client leaves, or says that it has nothing more to say.
    pub fn leave(&mut self, input: &mut Input<'_>) {
        let how = input.byte();
        let Some(stream) = self.pick(input) else {
            return;
        };
        match (how & 1, &stream.socket) {
            (0, Some(socket)) => drop(socket.shutdown(Shutdown::Write)),
            _ => stream.socket = None,
        }
    }

    /// The guest connects.
    pub fn open(&mut self, vm: &mut Vm, input: &mut Input<'_>) {
        if self.is_full() {
            return;
        }
        let host = match input.byte() & 7 {
            0 => 77,
            _ => LISTENED,
        };
        self.next_port += 1;
        let ports = (2000 + self.next_port, host);
        if host == LISTENED {
            self.waiting.push_back(ports);
        }
        vm.send(header(ports, op::REQUEST), b"");
    }

    /// A process of the host accepts.
    pub fn accept(&mut self, listener: &UnixListener) {
        let Ok((socket, _)) = listener.accept() else {
            return;
        };
        socket.set_nonblocking(true).expect("a socket");
        if let Some(ports) = self.waiting.pop_front() {
            let known = self.streams.iter_mut().find(|stream| stream.ports == ports);
            if let Some(stream) = known {
                stream.socket = Some(socket);
            }
        }
    }

    /// The guest takes a client, or does not.
    pub fn answer(&mut self, vm: &mut Vm, input: &mut Input<'_>) {
        let accepts = input.byte() & 7 != 0;
        let asks = |stream: &&mut Stream| stream.line_due && !stream.is_open && stream.is_fair;
        let Some(stream) = self.streams.iter_mut().find(asks) else {
            return;
        };
        stream.is_open = accepts;
        stream.is_fair &= accepts;
        let op = if accepts { op::RESPONSE } else { op::RST };
        vm.send(header(stream.ports, op), b"");
    }

    /// The guest sends as much as it may.
    pub fn send(&mut self, vm: &mut Vm, input: &mut Input<'_>) {
        let len = u32::from(input.u16()) % PIECE as u32;
        let Some(stream) = self.pick(input) else {
            return;
        };
        if !stream.is_open || !stream.is_fair {
            return;
        }
        let bytes = stream.to_host.piece(len.min(stream.credit()) as usize);
        let header = stream.header(op::RW);
        stream.to_host.sent += bytes.len() as u64;
        vm.send(header, &bytes);
    }

    /// The guest ends a direction, or the connection.
    pub fn shut_down(&mut self, vm: &mut Vm, input: &mut Input<'_>) {
        let flags = u32::from(input.byte() & 3);
        let Some(stream) = self.pick(input) else {
            return;
        };
        let mut header = stream.header(op::SHUTDOWN);
        header.flags = flags;
        if flags & shutdown::SEND != 0 {
            stream.is_open = false;
        }
        if flags & shutdown::RECEIVE != 0 {
            // What is on its way may be lost.
            stream.is_fair = false;
        }
        vm.send(header, b"");
    }

    /// The guest says what it should not.
    pub fn break_rules(&mut self, vm: &mut Vm, input: &mut Input<'_>) {
        let (how, len, flags) = (input.byte(), input.u16(), input.byte());
        let credit = input.u32();
        let stranger = (u32::from(how), FIRST_CLIENT + u32::from(flags & 15));
        let mut packet = header(stranger, u16::from(how % 9));
        if let Some(stream) = self.pick(input)
            && how & 0x80 != 0
        {
            stream.is_fair = false;
            packet = stream.header(u16::from(how % 9));
        } else {
            // It may be somebody's after all.
            let hit = |stream: &&mut Stream| stream.ports == stranger;
            if let Some(stream) = self.streams.iter_mut().find(hit) {
                stream.is_fair = false;
            }
            if how & 0x40 != 0 {
                packet = reset(packet);
            }
        }
        packet.buf_alloc = credit;
        packet.flags = u32::from(flags & 3);
        vm.send(packet, &vec![0xee; usize::from(len) % PIECE]);
    }

    /// The guest's driver starts anew.
    pub fn forget_all(&mut self) {
        self.streams.clear();
        self.waiting.clear();
        // Who has not been heard of yet stays; who of them asks next is not known.
        self.clients.clear();
    }

    pub fn distrust_all(&mut self) {
        for stream in &mut self.streams {
            stream.is_fair = false;
        }
        self.clients.clear();
    }

    /// The device has sent this.
    pub fn packet(&mut self, header: &Header, payload: &[u8]) {
        let ports = (header.dst_port, header.src_port);
        if header.op == op::REQUEST {
            // In the order in which they came.
            if let Some((socket, to_guest)) = self.clients.pop_front() {
                let mut stream = Stream::new(ports, Some(socket));
                stream.to_guest = to_guest;
                stream.line_due = true;
                self.streams.push(stream);
            }
            return;
        }
        if header.op == op::RESPONSE {
            let mut stream = Stream::new(ports, None);
            stream.is_open = true;
            self.streams.push(stream);
        }
        let known = |stream: &&mut Stream| stream.ports == ports;
        let Some(stream) = self.streams.iter_mut().rfind(known) else {
            if header.op == op::RST {
                self.waiting.retain(|waiting| *waiting != ports);
            }
            return;
        };
        stream.room = (header.buf_alloc, header.fwd_cnt);
        match header.op {
            op::RW if stream.is_fair => {
                stream.to_guest.arrive(payload);
                assert!(
                    payload.len() <= ROOM as usize,
                    "more than there is room for"
                );
            }
            op::RST => {
                stream.is_open = false;
                stream.is_fair = false;
            }
            op::SHUTDOWN if header.flags & shutdown::RECEIVE != 0 => stream.is_fair = false,
            _ => {}
        }
        if stream.is_fair {
            let forwarded = header.fwd_cnt.wrapping_sub(stream.to_host.sent as u32);
            assert!(
                forwarded == 0 || forwarded > u32::MAX / 2,
                "it was not sent"
            );
        }
    }
}

impl Stream {
    fn new(ports: (u32, u32), socket: Option<UnixStream>) -> Stream {
        Stream {
            socket,
            ports,
            to_host: Way::default(),
            to_guest: Way::default(),
            room: (0, 0),
            is_open: false,
            is_fair: true,
            line_due: false,
        }
    }

    /// The guest takes what comes at once.
    fn header(&self, op: u16) -> Header {
        Header {
            fwd_cnt: self.to_guest.arrived as u32,
            ..header(self.ports, op)
        }
    }

    fn credit(&self) -> u32 {
        let (most, forwarded) = self.room;
        let outstanding = (self.to_host.sent as u32).wrapping_sub(forwarded);
        most.saturating_sub(outstanding)
    }

    fn take(&mut self, len: usize) {
        let Some(mut socket) = self.socket.as_ref() else {
            return;
        };
        if self.line_due {
            let mut line = Vec::new();
            let mut byte = [0];
            while line.last() != Some(&b'\n') {
                match socket.read(&mut byte) {
                    Ok(1) => line.push(byte[0]),
                    // A line comes as a whole.
                    _ if line.is_empty() => return,
                    other => panic!("half a line, then {other:?}"),
                }
            }
            self.line_due = false;
            let ok = format!("OK {}\n", self.ports.1).into_bytes();
            assert!(line == ok || line.starts_with(b"ERR "), "{line:?}");
            assert!(line == ok || !self.is_open || !self.is_fair, "{line:?}");
        }
        let mut bytes = vec![0; len];
        match socket.read(&mut bytes) {
            Ok(count) if self.is_fair => self.to_host.arrive(&bytes[..count]),
            Ok(_) => {}
            Err(e) => assert!(
                matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionReset),
                "{e}"
            ),
        }
    }
}

fn header(ports: (u32, u32), op: u16) -> Header {
    let peer = Peer {
        guest: ports.0,
        host: ports.1,
        credit: ROOM,
    };
    peer.header(op)
}
