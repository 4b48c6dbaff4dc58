//! The device's core: what packets and host events do to connections.
//!
//! The owner of the virtqueues (the vhost-user glue, or the built-in VMM) calls
//! [`Device::transmit`] and [`Device::receive`] with a queue and guest memory,
//! and [`Device::host_events`] when [`Device::poll_fd`] is readable. None of
//! them waits, and each does a bounded amount of work per call.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemory;
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Phase, Ports};
use super::host::{Event, Greeting, Host, read_greeting};
use super::packet::{HEADER_LEN, HOST_CID, Header, Malformed, Slices, TYPE_STREAM, op, shutdown};
use super::table::{Table, Token};
use crate::vm::devices::throttle::Throttle;

/// Most connections at a time, both kinds together.
pub const MAX_CONNECTIONS: usize = 1024;
/// Most of them that the guest may have opened, so that it cannot lock the host out.
pub const MAX_GUEST_CONNECTIONS: usize = MAX_CONNECTIONS / 2;

/// Bytes the guest may send ahead of the host, per connection. The first
/// connections get the large window; together this bounds all backlogs to 47 MiB.
pub const LARGE_WINDOW: u32 = 256 * 1024;
pub const SMALL_WINDOW: u32 = 32 * 1024;
const LARGE_WINDOWS: usize = 64;

/// Most packets that wait for a receive buffer and belong to no connection. While
/// there are as many, no packet of the guest is processed.
const MAX_REPLIES: usize = 256;

/// Packets processed by one call of [`Device::transmit`].
const TRANSMIT_BATCH: usize = 16;

/// How long a client may take to send its CONNECT line.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest may take to answer a REQUEST.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest may take to confirm the end of a connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// First port that names a host client; lower ones are for services.
const FIRST_CLIENT_PORT: u32 = 1 << 30;

/// What a call that works on a queue has left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The call's share of work is done; call again.
    More,
    /// The ring is empty; it is the guest's turn.
    RingEmpty,
    /// Nothing to do, whatever the ring holds.
    Idle,
}

/// The socket device of one VM.
#[derive(Debug)]
pub struct Device {
    guest_cid: u64,
    host: Host,
    table: Table,
    /// Connections with a packet for the guest, in the order of their turns.
    ready: VecDeque<Token>,
    /// Packets for the guest that belong to no connection.
    replies: VecDeque<Header>,
    from_guest: usize,
    next_port: u32,
    /// Clients could not be accepted for want of descriptors.
    accept_again: bool,
    noise: Throttle,
}

impl Device {
    /// A device whose guest has the context id `guest_cid`, and whose sockets on
    /// the host are in `dir`.
    ///
    /// # Errors
    /// The listening socket or the event loop cannot be created.
    pub fn new(guest_cid: u64, dir: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            host: Host::new(dir)?,
            table: Table::default(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            from_guest: 0,
            next_port: FIRST_CLIENT_PORT,
            accept_again: false,
            noise: Throttle::default(),
        })
    }

    /// Readable whenever [`Device::host_events`] has something to do.
    #[must_use]
    pub fn poll_fd(&self) -> RawFd {
        self.host.poll_fd()
    }

    /// The device configuration (VIRTIO 1.2, 5.10.4).
    #[must_use]
    pub fn config(&self) -> [u8; 8] {
        self.guest_cid.to_le_bytes()
    }

    /// The guest's driver starts anew: it knows of no connection.
    ///
    /// Clients that the guest has not heard of yet stay.
    pub fn reset(&mut self) {
        let unknown = |c: &Connection| {
            matches!(
                c.phase,
                Phase::Greeting | Phase::Draining | Phase::Requested { sent: false }
            )
        };
        for token in self.table.select(|c| !unknown(c)) {
            self.remove(token);
        }
        self.replies.clear();
    }

    fn complain(&mut self, what: &dyn std::fmt::Display) {
        if let Some(suppressed) = self.noise.admit() {
            log::warn!("vsock: guest: {what} ({suppressed} similar lines suppressed)");
        }
    }

    // ---- packets of the guest ---------------------------------------------

    /// Processes packets that the guest has sent.
    ///
    /// # Errors
    /// The guest has broken its ring; it is useless until the next reset.
    pub fn transmit<M: GuestMemory>(
        &mut self,
        mem: &M,
        queue: &mut Queue,
    ) -> Result<Progress, virtio_queue::Error> {
        let mut slices = Slices::new();
        for _ in 0..TRANSMIT_BATCH {
            if self.replies.len() >= MAX_REPLIES {
                return Ok(Progress::Idle);
            }
            let Some(chain) = queue.iter(mem)?.next() else {
                return Ok(Progress::RingEmpty);
            };
            let head = chain.head_index();
            slices.clear();
            match slices.push_chain(mem, chain, false) {
                Ok(total) => self.packet(&mut slices, total),
                Err(malformed) => self.complain(&malformed),
            }
            queue.add_used(mem, head, 0)?;
        }
        Ok(Progress::More)
    }

    fn packet<M: GuestMemory>(&mut self, slices: &mut Slices<'_, M>, total: usize) {
        let all = 0..slices.end();
        let header = match slices.read_header(all.clone()) {
            Ok(header) => header,
            Err(malformed) => return self.complain(&malformed),
        };
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return self.complain(&"packet with a foreign context id");
        }
        if header.kind != TYPE_STREAM {
            return self.refuse(&header);
        }
        let ports = Ports {
            guest: header.src_port,
            host: header.dst_port,
        };
        let known = self.table.find(ports);
        if total - HEADER_LEN < header.len as usize {
            self.complain(&Malformed::TooShort);
            return self.abort(known, &header);
        }
        match known {
            None if header.op == op::REQUEST => self.open(ports, &header),
            None => self.refuse(&header),
            Some(token) => self.deliver(token, &header, slices, all),
        }
    }

    /// A packet for a connection the table knows.
    fn deliver<M: GuestMemory>(
        &mut self,
        token: Token,
        header: &Header,
        slices: &mut Slices<'_, M>,
        all: Range<usize>,
    ) {
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        connection.update_credit(header);
        let phase = connection.phase;
        match (phase, header.op) {
            (_, op::RST) => self.guest_left(token),
            (Phase::Requested { sent: true }, op::RESPONSE) => {
                connection.phase = Phase::Established;
                connection.deadline = None;
                let port = connection.ports.host;
                connection.say(&format!("OK {port}\n"));
            }
            (Phase::Established, op::RW) => {
                if let Err(violation) = connection.forward(slices, all, header.len) {
                    self.complain(&violation);
                    self.abort(Some(token), header);
                }
            }
            (Phase::Established, op::SHUTDOWN) => connection.guest_shutdown(header.flags),
            (Phase::Established | Phase::Closing, op::CREDIT_UPDATE) => {}
            (Phase::Established, op::CREDIT_REQUEST) => connection.ask_credit(),
            // The host has closed its end; what crosses with that is of no use.
            (Phase::Closing, op::RW | op::CREDIT_REQUEST) => {}
            (Phase::Closing, op::SHUTDOWN) => {
                connection.guest_shutdown(header.flags);
                if connection.guest_closed() {
                    self.replies.push_back(header.reset_reply());
                    self.remove(token);
                }
            }
            _ => {
                self.complain(&format_args!("operation {} in phase {phase:?}", header.op));
                self.abort(Some(token), header);
            }
        }
        self.settle(token);
    }

    /// The guest connects to `ports.host` of the host.
    fn open(&mut self, ports: Ports, header: &Header) {
        let full = self.from_guest >= MAX_GUEST_CONNECTIONS || self.table.len() >= MAX_CONNECTIONS;
        if full {
            self.complain(&"too many connections");
            return self.refuse(header);
        }
        // Nobody listening is an ordinary answer, not an event worth a line.
        let Ok(socket) = self.host.connect(ports.host) else {
            return self.refuse(header);
        };
        let mut connection = Connection::new(socket, ports, Phase::Established, self.window());
        connection.from_guest = true;
        connection.response_due = true;
        connection.update_credit(header);
        let Some(token) = self.add(connection) else {
            return self.refuse(header);
        };
        self.table.publish(token);
        self.settle(token);
    }

    /// Answers a packet that belongs to no connection.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.replies.push_back(header.reset_reply());
        }
    }

    /// Ends a connection whose guest end misbehaves.
    fn abort(&mut self, connection: Option<Token>, header: &Header) {
        self.refuse(header);
        if let Some(token) = connection {
            self.guest_left(token);
        }
    }

    /// The guest's end is gone. The host still gets the bytes it is owed.
    fn guest_left(&mut self, token: Token) {
        self.table.unpublish(token);
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        if matches!(connection.phase, Phase::Requested { .. }) {
            connection.dismiss("ERR connection refused\n");
        }
        if !connection.has_backlog() {
            return self.remove(token);
        }
        connection.phase = Phase::Draining;
        connection.deadline = None;
        connection.guest_shutdown(shutdown::BOTH);
        self.settle(token);
    }

    // ---- packets for the guest ----------------------------------------------

    /// Sends packets to the guest, as far as it has provided buffers: all those
    /// without a connection, then one turn of one connection.
    ///
    /// # Errors
    /// The guest has broken its ring; it is useless until the next reset.
    pub fn receive<M: GuestMemory>(
        &mut self,
        mem: &M,
        queue: &mut Queue,
    ) -> Result<Progress, virtio_queue::Error> {
        let mut slices = Slices::new();
        while let Some(header) = self.replies.front().copied() {
            if !self.put(mem, queue, &mut slices, &header)? {
                return Ok(Progress::RingEmpty);
            }
            self.replies.pop_front();
        }
        let Some(token) = self.ready.pop_front() else {
            return Ok(Progress::Idle);
        };
        let served = self.serve(mem, queue, &mut slices, token)?;
        if let Some(connection) = self.table.get_mut(token) {
            if served {
                connection.queued = false;
                self.settle(token);
            } else {
                self.ready.push_front(token);
            }
        }
        Ok(if served {
            Progress::More
        } else {
            Progress::RingEmpty
        })
    }

    /// Sends what is due on one connection; `false` if buffers ran out.
    fn serve<'m, M: GuestMemory>(
        &mut self,
        mem: &'m M,
        queue: &mut Queue,
        slices: &mut Slices<'m, M>,
        token: Token,
    ) -> Result<bool, virtio_queue::Error> {
        let guest_cid = self.guest_cid;
        // What made it ready may have passed meanwhile.
        let Some(connection) = self.table.get_mut(token).filter(|c| c.has_work()) else {
            return Ok(true);
        };
        let opening = match connection.phase {
            Phase::Requested { .. } => Some(op::REQUEST),
            Phase::Established if connection.response_due => Some(op::RESPONSE),
            _ => None,
        };
        if let Some(op) = opening {
            let header = connection.header(guest_cid, op);
            if !self.put(mem, queue, slices, &header)? {
                return Ok(false);
            }
            self.opened(token);
        }
        if !self.send_data(mem, queue, slices, token)? {
            return Ok(false);
        }
        let Some(connection) = self.table.get_mut(token).filter(|c| c.has_work()) else {
            return Ok(true);
        };
        let (op, flags) = match connection.shutdown_due() {
            Some(flags) => (op::SHUTDOWN, flags),
            None if connection.credit_update_due() => (op::CREDIT_UPDATE, 0),
            None => return Ok(true),
        };
        let mut header = connection.header(guest_cid, op);
        header.flags = flags;
        if !self.put(mem, queue, slices, &header)? {
            return Ok(false);
        }
        if let Some(connection) = self.table.get_mut(token) {
            connection.shutdown_told(flags);
        }
        Ok(true)
    }

    /// The REQUEST or RESPONSE of a connection has been sent.
    fn opened(&mut self, token: Token) {
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        if let Phase::Requested { sent } = &mut connection.phase {
            *sent = true;
        }
        connection.response_due = false;
    }

    /// Sends one packet without payload; `false` if there is no buffer for it.
    fn put<'m, M: GuestMemory>(
        &mut self,
        mem: &'m M,
        queue: &mut Queue,
        slices: &mut Slices<'m, M>,
        header: &Header,
    ) -> Result<bool, virtio_queue::Error> {
        slices.clear();
        let Some((head, _)) = self.next_buffer(mem, queue, slices)? else {
            return Ok(false);
        };
        slices.write_header(0..slices.end(), header);
        queue.add_used(mem, head, HEADER_LEN as u32)?;
        Ok(true)
    }

    /// The next receive buffer that can hold a header: its head and its room for
    /// payload. Buffers that cannot are returned unused.
    fn next_buffer<'m, M: GuestMemory>(
        &mut self,
        mem: &'m M,
        queue: &mut Queue,
        slices: &mut Slices<'m, M>,
    ) -> Result<Option<(u16, u32)>, virtio_queue::Error> {
        // No more than the ring holds, or a guest that refills it with nonsense
        // would keep the device here.
        for _ in 0..queue.size() {
            let Some(chain) = queue.iter(mem)?.next() else {
                return Ok(None);
            };
            let head = chain.head_index();
            match slices.push_chain(mem, chain, true) {
                // A chain is at most 2^32 bytes long.
                Ok(total) => return Ok(Some((head, (total - HEADER_LEN) as u32))),
                Err(malformed) => {
                    self.complain(&malformed);
                    queue.add_used(mem, head, 0)?;
                }
            }
        }
        Ok(None)
    }

    /// Moves bytes from the host socket into as many receive buffers as one
    /// transfer can fill; `false` if there was not a single buffer.
    fn send_data<'m, M: GuestMemory>(
        &mut self,
        mem: &'m M,
        queue: &mut Queue,
        slices: &mut Slices<'m, M>,
        token: Token,
    ) -> Result<bool, virtio_queue::Error> {
        let wanted = match self.table.get(token) {
            Some(connection) => connection.readable_bytes(),
            None => 0,
        };
        if wanted == 0 {
            return Ok(true);
        }
        let buffers = self.collect(mem, queue, slices, wanted)?;
        if buffers.is_empty() {
            return Ok(false);
        }
        let offered = buffers.iter().map(|b| b.room).sum();
        let guest_cid = self.guest_cid;
        let Some(connection) = self.table.get_mut(token) else {
            return Ok(true);
        };
        let mut filled = connection.fill(slices, offered);
        for buffer in buffers {
            if filled == 0 {
                // Buffers were taken in order, so the unused ones are the last.
                queue.go_to_previous_position();
                continue;
            }
            let len = filled.min(buffer.room);
            filled -= len;
            let mut header = connection.header(guest_cid, op::RW);
            header.len = len;
            slices.write_header(buffer.slices.clone(), &header);
            slices.mark_dirty(buffer.slices, HEADER_LEN, len as usize);
            queue.add_used(mem, buffer.head, HEADER_LEN as u32 + len)?;
        }
        Ok(true)
    }

    /// Takes receive buffers for up to `wanted` bytes of payload.
    fn collect<'m, M: GuestMemory>(
        &mut self,
        mem: &'m M,
        queue: &mut Queue,
        slices: &mut Slices<'m, M>,
        mut wanted: u32,
    ) -> Result<Vec<Buffer>, virtio_queue::Error> {
        let mut buffers = Vec::new();
        slices.clear();
        slices.clear_iovecs();
        while wanted > 0 {
            let start = slices.end();
            let Some((head, room)) = self.next_buffer(mem, queue, slices)? else {
                break;
            };
            let room = room.min(wanted);
            wanted -= room;
            let range = start..slices.end();
            slices.add_iovecs(range.clone(), HEADER_LEN, room as usize);
            buffers.push(Buffer {
                head,
                slices: range,
                room,
            });
        }
        Ok(buffers)
    }

    // ---- the host ---------------------------------------------------------

    /// Processes what has happened on the host. What is left keeps the
    /// descriptor readable.
    pub fn host_events(&mut self) {
        let mut events = Vec::new();
        if let Err(e) = self.host.events(&mut events) {
            // epoll_wait(2) fails only for reasons that a restart does not cure.
            log::error!("vsock: epoll: {e}");
            return;
        }
        for event in events {
            match event {
                Event::Clients => self.accept_clients(),
                Event::Tick => self.tick(),
                Event::Connection(token, what) => self.socket_event(token, what),
            }
        }
    }

    fn accept_clients(&mut self) {
        self.accept_again = false;
        loop {
            match self.host.accept() {
                Ok(Some(socket)) => self.client(socket),
                Ok(None) => return,
                Err(e) => {
                    log::error!("vsock: accept: {e}");
                    self.accept_again = true;
                    self.host.set_ticking(true);
                    return;
                }
            }
        }
    }

    fn client(&mut self, socket: UnixStream) {
        let ports = Ports { guest: 0, host: 0 };
        let mut connection = Connection::new(socket, ports, Phase::Greeting, self.window());
        if self.table.len() >= MAX_CONNECTIONS {
            connection.dismiss("ERR too many connections\n");
            return;
        }
        connection.deadline = Some(Instant::now() + GREETING_TIMEOUT);
        self.host.set_ticking(true);
        if let Some(token) = self.add(connection) {
            self.greet(token);
        }
    }

    fn window(&self) -> u32 {
        if self.table.len() < LARGE_WINDOWS {
            LARGE_WINDOW
        } else {
            SMALL_WINDOW
        }
    }

    /// Puts a connection into the table and under watch.
    fn add(&mut self, connection: Connection) -> Option<Token> {
        let fd = connection.raw_fd()?;
        let from_guest = connection.from_guest;
        let token = self.table.insert(connection);
        if let Err(e) = self.host.watch(fd, token) {
            log::error!("vsock: epoll: {e}");
            self.table.remove(token);
            return None;
        }
        self.from_guest += usize::from(from_guest);
        Some(token)
    }

    fn remove(&mut self, token: Token) {
        let from_guest = self.table.get(token).is_some_and(|c| c.from_guest);
        self.from_guest -= usize::from(from_guest);
        self.table.remove(token);
    }

    fn socket_event(&mut self, token: Token, what: EventSet) {
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        if connection.phase == Phase::Greeting {
            return self.greet(token);
        }
        connection.set_readable();
        if what.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.lose_host_reader();
        } else if what.contains(EventSet::OUT) {
            connection.flush();
        }
        self.settle(token);
    }

    /// Reads the CONNECT line of a client, and asks the guest.
    fn greet(&mut self, token: Token) {
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        let Some(socket) = connection.socket() else {
            return;
        };
        match read_greeting(socket) {
            Greeting::Partial => {}
            Greeting::Gone => self.remove(token),
            Greeting::Malformed => {
                connection.dismiss("ERR malformed request\n");
                self.remove(token);
            }
            Greeting::Connect(guest) => {
                let host = self.free_port(guest);
                if let Some(connection) = self.table.get_mut(token) {
                    connection.ports = Ports { guest, host };
                    connection.phase = Phase::Requested { sent: false };
                    connection.deadline = Some(Instant::now() + REQUEST_TIMEOUT);
                }
                self.table.publish(token);
                self.settle(token);
            }
        }
    }

    /// A port of the host that no connection to `guest` uses.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            // There are far fewer connections than ports, so this ends.
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_CLIENT_PORT);
            if self.table.find(Ports { guest, host }).is_none() {
                return host;
            }
        }
    }

    fn tick(&mut self) {
        if self.accept_again {
            self.accept_clients();
        }
        let now = Instant::now();
        for token in self.table.select(|c| c.deadline.is_some_and(|d| d <= now)) {
            self.expire(token);
        }
        let pending = !self.table.select(|c| c.deadline.is_some()).is_empty();
        self.host.set_ticking(pending || self.accept_again);
    }

    fn expire(&mut self, token: Token) {
        let guest_cid = self.guest_cid;
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        let known_to_guest = match connection.phase {
            Phase::Requested { sent } => {
                connection.dismiss("ERR connection timed out\n");
                sent
            }
            Phase::Closing => true,
            _ => {
                connection.dismiss("ERR no request\n");
                false
            }
        };
        if known_to_guest {
            let reset = connection.header(guest_cid, op::RST);
            self.replies.push_back(reset);
        }
        self.remove(token);
    }

    #[cfg(test)]
    pub fn connections(&self) -> usize {
        self.table.len()
    }

    #[cfg(test)]
    pub fn replies(&self) -> usize {
        self.replies.len()
    }

    /// Lets every deadline pass.
    #[cfg(test)]
    pub fn expire_all(&mut self) {
        for token in self.table.select(|c| c.deadline.is_some()) {
            self.expire(token);
        }
    }

    // ---- transitions --------------------------------------------------------

    /// Brings a connection to the state that follows from what has happened to
    /// it. Called after every event.
    fn settle(&mut self, token: Token) {
        let guest_cid = self.guest_cid;
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        connection.apply_guest_shutdown();
        match connection.phase {
            Phase::Established if connection.guest_closed() => {
                let reset = connection.header(guest_cid, op::RST);
                self.replies.push_back(reset);
                return self.guest_left(token);
            }
            Phase::Established if connection.is_finished() && !connection.response_due => {
                connection.phase = Phase::Closing;
                connection.close_socket();
                connection.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
                self.host.set_ticking(true);
            }
            Phase::Draining if !connection.has_backlog() => return self.remove(token),
            _ => {}
        }
        self.watch_room(token);
        if let Some(connection) = self.table.get_mut(token) {
            if connection.has_work() && !connection.queued {
                connection.queued = true;
                self.ready.push_back(token);
            }
        }
    }

    /// Watches for room in the socket if, and only if, bytes wait for it.
    fn watch_room(&mut self, token: Token) {
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        let room = connection.has_backlog();
        let Some(fd) = connection
            .raw_fd()
            .filter(|_| room != connection.watching_room)
        else {
            return;
        };
        connection.watching_room = room;
        if let Err(e) = self.host.watch_room(fd, token, room) {
            log::error!("vsock: epoll: {e}");
        }
    }
}

/// A receive buffer that has been taken from the ring.
#[derive(Debug)]
struct Buffer {
    head: u16,
    slices: Range<usize>,
    /// Bytes of payload to put into it.
    room: u32,
}
