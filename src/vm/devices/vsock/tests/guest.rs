//! A guest driver and a host directory for tests.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::device::{Device, Progress};
use super::super::packet::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use crate::sys::unix_socket;

pub const CID: u64 = 3;
/// Credit the guest grants unless a test says otherwise.
pub const CREDIT: u32 = 256 * 1024;

const SIZE: u16 = 64;
const DESCRIPTOR: u64 = 16;
const NEXT: u16 = 1;
pub const WRITE: u16 = 2;

/// Room for the buffers of one slot of a ring.
const SLOT: u64 = 0x2_0000;
const RX_BUFFER: u32 = 4096;

/// A split virtqueue seen from the driver.
struct Ring {
    base: u64,
    buffers: u64,
    avail: u16,
    seen: u16,
    queue: Queue,
}

impl Ring {
    fn new(base: u64, buffers: u64) -> Self {
        let mut ring = Self {
            base,
            buffers,
            avail: 0,
            seen: 0,
            queue: Queue::new(SIZE).unwrap(),
        };
        ring.start();
        ring
    }

    fn start(&mut self) {
        let low = |address: u64| Some(address as u32);
        let queue = &mut self.queue;
        queue.set_size(SIZE);
        queue.set_desc_table_address(low(self.base), None);
        queue.set_avail_ring_address(low(self.base + 0x1000), None);
        queue.set_used_ring_address(low(self.base + 0x2000), None);
        queue.set_ready(true);
    }

    /// Makes the chain of `parts` available in `slot` (also its descriptors').
    fn add(&mut self, mem: &GuestMemoryMmap, slot: u16, parts: &[(u64, u32, u16)]) {
        // Each slot has 256 / 64 = 4 descriptors of its own in the second half of
        // an indirect-free table; longer chains use an indirect table.
        let table = self.buffers + u64::from(SIZE) * SLOT + u64::from(slot) * 0x1000;
        for (index, (address, len, flags)) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let flags = flags | if last { 0 } else { NEXT };
            write_descriptor(
                mem,
                table,
                index as u16,
                *address,
                *len,
                flags,
                index as u16 + 1,
            );
        }
        const INDIRECT: u16 = 4;
        let len = (parts.len() as u64 * DESCRIPTOR) as u32;
        write_descriptor(mem, self.base, slot, table, len, INDIRECT, 0);
        self.publish(mem, slot);
    }

    fn publish(&mut self, mem: &GuestMemoryMmap, slot: u16) {
        let avail = self.base + 0x1000;
        let at = avail + 4 + 2 * u64::from(self.avail % SIZE);
        mem.write_obj(slot.to_le(), GuestAddress(at)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        mem.write_obj(self.avail.to_le(), GuestAddress(avail + 2))
            .unwrap();
    }

    /// The next used slot and how many bytes the device wrote.
    fn used(&mut self, mem: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let used = self.base + 0x2000;
        let index: u16 = mem.read_obj(GuestAddress(used + 2)).unwrap();
        if index == self.seen {
            return None;
        }
        let at = used + 4 + 8 * u64::from(self.seen % SIZE);
        self.seen = self.seen.wrapping_add(1);
        let slot: u32 = mem.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = mem.read_obj(GuestAddress(at + 4)).unwrap();
        Some((slot as u16, len))
    }

    fn slot_address(&self, slot: u16) -> u64 {
        self.buffers + u64::from(slot) * SLOT
    }
}

fn write_descriptor(
    mem: &GuestMemoryMmap,
    table: u64,
    index: u16,
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
) {
    let at = table + u64::from(index) * DESCRIPTOR;
    mem.write_obj(address.to_le(), GuestAddress(at)).unwrap();
    mem.write_obj(len.to_le(), GuestAddress(at + 8)).unwrap();
    mem.write_obj(flags.to_le(), GuestAddress(at + 12)).unwrap();
    mem.write_obj(next.to_le(), GuestAddress(at + 14)).unwrap();
}

/// A VM: guest driver, device, host directory.
pub struct Vm {
    mem: GuestMemoryMmap,
    tx: Ring,
    rx: Ring,
    pub device: Device,
    pub root: tempfile::TempDir,
    packets: VecDeque<(Header, Vec<u8>)>,
    /// Receive buffers are given back to the device.
    pub refill: bool,
}

impl Vm {
    pub fn new() -> Self {
        let mut vm = Self::without_buffers();
        vm.post_buffers(SIZE);
        vm
    }

    /// A guest that has not provided receive buffers yet.
    pub fn without_buffers() -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = File::open(root.path()).unwrap();
        let len = 2 * (u64::from(SIZE) * SLOT + u64::from(SIZE) * 0x1000) + 0x10_0000;
        let rx_buffers = 0x10_0000 + u64::from(SIZE) * (SLOT + 0x1000);
        Self {
            mem: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len as usize)]).unwrap(),
            tx: Ring::new(0x1_0000, 0x10_0000),
            rx: Ring::new(0x2_0000, rx_buffers),
            device: Device::new(CID, dir.into()).unwrap(),
            root,
            packets: VecDeque::new(),
            refill: true,
        }
    }

    pub fn post_buffers(&mut self, count: u16) {
        for slot in 0..count {
            self.post_buffer(slot);
        }
    }

    fn post_buffer(&mut self, slot: u16) {
        let at = self.rx.slot_address(slot);
        // Header and payload apart, as Linux 6.1 has them.
        let parts = [
            (at, HEADER_LEN as u32, WRITE),
            (at + 0x1000, RX_BUFFER, WRITE),
        ];
        self.rx.add(&self.mem, slot, &parts);
    }

    /// Offers a receive buffer of any shape.
    pub fn post_raw(&mut self, slot: u16, parts: &[(u64, u32, u16)]) {
        self.rx.add(&self.mem, slot, parts);
    }

    /// Sends `bytes` in one chain whose parts have these lengths and flags.
    pub fn send_raw(&mut self, bytes: &[u8], parts: &[(usize, u16)]) {
        let slot = self.tx.avail % SIZE;
        let at = self.tx.slot_address(slot);
        self.mem.write_slice(bytes, GuestAddress(at)).unwrap();
        let mut from = at;
        let mut chain = Vec::new();
        for (len, flags) in parts {
            chain.push((from, *len as u32, *flags));
            from += *len as u64;
        }
        self.tx.add(&self.mem, slot, &chain);
        self.run();
    }

    /// Sends a chain with these descriptors.
    pub fn send_chain(&mut self, parts: &[(u64, u32, u16)]) {
        let slot = self.tx.avail % SIZE;
        self.tx.add(&self.mem, slot, parts);
        self.run();
    }

    /// Makes the device look at `avail` although nothing is there.
    pub fn break_transmit_ring(&mut self) {
        let at = GuestAddress(self.tx.base + 0x1002);
        self.mem.write_obj(0x7000u16.to_le(), at).unwrap();
    }

    pub fn transmit(&mut self) -> Result<Progress, virtio_queue::Error> {
        self.device.transmit(&self.mem, &mut self.tx.queue)
    }

    /// Sends a packet; `header` needs only what differs from the usual.
    pub fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..header
        };
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(payload);
        let mut parts = vec![(HEADER_LEN, 0)];
        if !payload.is_empty() {
            parts.push((payload.len(), 0));
        }
        self.send_raw(&bytes, &parts);
    }

    /// Lets the device work until it is idle.
    pub fn run(&mut self) {
        loop {
            self.device.host_events();
            let mut idle = true;
            while self.transmit().unwrap() == Progress::More {
                idle = false;
            }
            while self.tx.used(&self.mem).is_some() {}
            while self.device.receive(&self.mem, &mut self.rx.queue).unwrap() == Progress::More {
                idle = false;
            }
            idle &= !self.take_packets();
            if idle {
                return;
            }
        }
    }

    fn take_packets(&mut self) -> bool {
        let mut any = false;
        while let Some((slot, len)) = self.rx.used(&self.mem) {
            any = true;
            let at = self.rx.slot_address(slot);
            let mut bytes = [0; HEADER_LEN];
            self.mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            if len as usize >= HEADER_LEN {
                let header = Header::from_bytes(&bytes);
                let mut payload = vec![0; header.len as usize];
                assert_eq!(len as usize, HEADER_LEN + payload.len());
                self.mem
                    .read_slice(&mut payload, GuestAddress(at + 0x1000))
                    .unwrap();
                self.packets.push_back((header, payload));
            }
            if self.refill {
                self.post_buffer(slot);
            }
        }
        any
    }

    /// The next packet for the guest, waiting for the host for a moment.
    pub fn packet(&mut self) -> Option<(Header, Vec<u8>)> {
        let deadline = Instant::now() + Duration::from_millis(50);
        loop {
            self.run();
            if let Some(packet) = self.packets.pop_front() {
                return Some(packet);
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The next packet, which must be of this operation.
    #[track_caller]
    pub fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let packet = self.packet().expect("no packet");
        assert_eq!(packet.0.op, op, "{:?}", packet.0);
        packet
    }

    #[track_caller]
    pub fn expect_nothing(&mut self) {
        let packet = self.packet();
        assert!(packet.is_none(), "{:?}", packet.unwrap().0);
    }

    // ---- both ends of connections -------------------------------------------

    /// A host client that has sent this.
    pub fn client(&mut self, first: &[u8]) -> UnixStream {
        let dir = File::open(self.root.path()).unwrap();
        let mut client = unix_socket::connect(&dir, "vsock.sock").unwrap();
        std::io::Write::write_all(&mut client, first).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        self.run();
        client
    }

    /// A connection from the host to port 1024 of the guest.
    pub fn connected(&mut self) -> (UnixStream, Peer) {
        self.connected_with(b"", CREDIT)
    }

    /// As [`Vm::connected`], with bytes behind the CONNECT line, by a guest that
    /// grants this credit.
    pub fn connected_with(&mut self, bytes: &[u8], credit: u32) -> (UnixStream, Peer) {
        let mut client = self.client(&[b"CONNECT 1024\n", bytes].concat());
        let (request, _) = self.expect(op::REQUEST);
        let peer = Peer {
            guest: request.dst_port,
            host: request.src_port,
            credit,
        };
        self.send(peer.header(op::RESPONSE), b"");
        assert_eq!(line(&mut client), format!("OK {}\n", peer.host));
        (client, peer)
    }

    /// A packet that is there already.
    pub fn pop(&mut self) -> Option<(Header, Vec<u8>)> {
        self.packets.pop_front()
    }

    /// As [`Vm::connected`], whatever else the device has to send.
    pub fn fresh_connection(&mut self) -> (UnixStream, Peer) {
        let client = self.client(b"CONNECT 1024\n");
        loop {
            let (header, _) = self.packet().expect("no packet");
            if header.op == op::REQUEST {
                let peer = Peer {
                    guest: header.dst_port,
                    host: header.src_port,
                    credit: CREDIT,
                };
                self.send(peer.header(op::RESPONSE), b"");
                return (client, peer);
            }
        }
    }

    /// A listener for port `port` of the host.
    pub fn listen(&self, port: u32) -> UnixListener {
        let dir = File::open(self.root.path()).unwrap();
        unix_socket::bind(&dir, &format!("vsock.sock_{port}")).unwrap()
    }
}

/// The guest's end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub guest: u32,
    pub host: u32,
    pub credit: u32,
}

impl Peer {
    pub fn header(&self, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: self.guest,
            dst_port: self.host,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.credit,
            ..Header::default()
        }
    }

    pub fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(op::SHUTDOWN)
        }
    }
}

/// One line from a client's socket, and not a byte more.
pub fn line(client: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        assert_eq!(client.read(&mut byte).unwrap(), 1, "end of the stream");
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

/// Everything up to the end of the stream.
pub fn rest(client: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).unwrap();
    bytes
}
