//! One stream between a unix socket on the host and a vsock socket in the guest.
//!
//! The two directions are independent. Towards the guest, bytes stay in the
//! host socket until the guest has granted credit for them, so nothing is
//! buffered here. Towards the host, bytes go straight from guest memory into the
//! host socket; what it does not take is kept in the backlog, which can never
//! exceed the credit that this side has granted (`buf_alloc`). The guest is
//! granted new credit only for bytes the socket has taken, so a slow reader
//! stalls its own connection and nothing else.
//!
//! A direction ends on its own: the end of the host's stream becomes
//! `SHUTDOWN(SEND)`, a host that no longer reads becomes `SHUTDOWN(RECEIVE)`,
//! and the guest's shutdown flags become shutdown(2), after the backlog.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vm_memory::GuestMemory;

use super::packet::{HEADER_LEN, HOST_CID, Header, Slices, TYPE_STREAM, op, shutdown};

/// Least and most bytes that one transfer towards the guest tries to move. It
/// adapts in between, because preparing many buffers for a short message costs
/// latency.
const BURST: Range<u32> = 4096..131_072;

/// Most bytes read from a client only to be dropped; more than a socket holds.
const MAX_UNWANTED: usize = 1024 * 1024;

/// Both ends of a connection as the guest names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    pub guest: u32,
    pub host: u32,
}

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A host client has not sent its CONNECT line yet.
    Greeting,
    /// The guest has not answered the REQUEST yet.
    Requested { sent: bool },
    /// Both ends are connected.
    Established,
    /// Nothing is left to transfer; the guest has not confirmed that yet.
    Closing,
    /// The guest is done with the connection; the host has bytes to collect.
    Draining,
}

/// The guest broke the rules of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("data beyond the granted credit")]
    Credit,
    #[error("data after the end of the stream")]
    DataAfterShutdown,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    pub ports: Ports,
    pub phase: Phase,
    /// When the phase is given up.
    pub deadline: Option<Instant>,
    /// The connection is in the device's list of work towards the guest.
    pub queued: bool,
    /// The event loop watches for room in the socket.
    pub watching_room: bool,
    /// The guest opened it, and has not been answered yet.
    pub response_due: bool,
    pub from_guest: bool,
    socket: Option<UnixStream>,

    // Towards the host.
    backlog: VecDeque<u8>,
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    announced: u32,
    credit_asked: bool,
    host_gone: bool,
    write_closed: bool,

    // Towards the guest.
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    sent: u32,
    burst: u32,
    readable: bool,
    host_eof: bool,
    read_closed: bool,

    // Shutdown flags: what the guest said and what it has been told.
    guest_done: u32,
    told: u32,
}

impl Connection {
    /// `buf_alloc` is how many bytes the guest may send ahead of the host.
    #[must_use]
    pub fn new(socket: UnixStream, ports: Ports, phase: Phase, buf_alloc: u32) -> Self {
        Self {
            ports,
            phase,
            deadline: None,
            queued: false,
            watching_room: false,
            response_due: false,
            from_guest: false,
            socket: Some(socket),
            backlog: VecDeque::new(),
            buf_alloc,
            received: 0,
            forwarded: 0,
            announced: 0,
            credit_asked: false,
            host_gone: false,
            write_closed: false,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            sent: 0,
            burst: BURST.start,
            readable: true,
            host_eof: false,
            read_closed: false,
            guest_done: 0,
            told: 0,
        }
    }

    #[must_use]
    pub fn socket(&self) -> Option<&UnixStream> {
        self.socket.as_ref()
    }

    /// Header of the next packet of this connection towards the guest. Once the
    /// packet has really been sent, [`Connection::has_sent`] must hear of it.
    #[must_use]
    pub fn header(&self, guest_cid: u64, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }

    /// The guest has been sent a packet with this header.
    pub fn has_sent(&mut self, header: &Header) {
        self.announced = header.fwd_cnt;
        self.credit_asked = false;
        match header.op {
            op::REQUEST => self.phase = Phase::Requested { sent: true },
            op::RESPONSE => self.response_due = false,
            op::SHUTDOWN => self.told |= header.flags,
            _ => {}
        }
    }

    /// Takes over what a packet of the guest says about its receive buffer.
    pub fn update_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
    }

    /// Bytes the guest can take now. Nonsense from the guest gives 0 or more
    /// than it can take, which hurts only itself.
    #[must_use]
    pub fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    /// The guest wants to know how much it may send.
    pub fn ask_credit(&mut self) {
        self.credit_asked = true;
    }

    /// Whether the guest has to hear about the room on this side, because the
    /// room it knows of is less than half. Linux sends no more ahead than its own
    /// receive buffer holds, and does not ask for news when that is used up.
    #[must_use]
    pub fn credit_update_due(&self) -> bool {
        let usable = match self.peer_buf_alloc {
            0 => self.buf_alloc,
            own => self.buf_alloc.min(own),
        };
        self.credit_asked || self.forwarded.wrapping_sub(self.announced) >= (usable / 2).max(1)
    }

    // ---- towards the host -------------------------------------------------

    /// Forwards `len` bytes of payload of the packet in the slices `range`.
    ///
    /// # Errors
    /// The guest was not allowed to send them.
    pub fn forward<M: GuestMemory>(
        &mut self,
        slices: &mut Slices<'_, M>,
        range: Range<usize>,
        len: u32,
    ) -> Result<(), Violation> {
        if self.guest_done & shutdown::SEND != 0 {
            return Err(Violation::DataAfterShutdown);
        }
        let outstanding = self.received.wrapping_sub(self.forwarded);
        if outstanding
            .checked_add(len)
            .is_none_or(|sum| sum > self.buf_alloc)
        {
            return Err(Violation::Credit);
        }
        self.received = self.received.wrapping_add(len);
        let mut done = 0;
        if self.backlog.is_empty() && !self.host_gone {
            done = self.forward_directly(slices, range.clone(), len);
        }
        if self.host_gone {
            self.forwarded = self.received;
            return Ok(());
        }
        let rest = (len - done) as usize;
        if rest > 0 {
            // Through a buffer, because a deque takes a slice at once; it grows byte
            // by byte with `resize`, which was nine tenths of this thread's time.
            let mut bytes = vec![0; rest];
            slices.copy_out(range, HEADER_LEN + done as usize, &mut bytes);
            self.backlog.extend(&bytes);
        }
        Ok(())
    }

    /// Writes from guest memory to the socket; returns how much it took.
    fn forward_directly<M: GuestMemory>(
        &mut self,
        slices: &mut Slices<'_, M>,
        range: Range<usize>,
        len: u32,
    ) -> u32 {
        let Some(socket) = &self.socket else {
            self.host_gone = true;
            return 0;
        };
        slices.clear_iovecs();
        slices.add_iovecs(range, HEADER_LEN, len as usize);
        match slices.send_to(socket.as_fd()) {
            Ok(count) => {
                // No more than `len`, which is a u32.
                let count = count as u32;
                self.forwarded = self.forwarded.wrapping_add(count);
                count
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_) => {
                self.lose_host_reader();
                0
            }
        }
    }

    /// Answers the CONNECT line. The socket has carried nothing yet, so a line
    /// always fits.
    pub fn say(&mut self, line: &str) {
        let Some(mut socket) = self.socket.as_ref() else {
            return;
        };
        if socket.write_all(line.as_bytes()).is_err() {
            self.lose_host_reader();
        }
    }

    /// Tells a client why it is not connected, and closes its socket.
    ///
    /// What the client has sent is read first: bytes that are unread when a socket
    /// closes make the client see a reset behind the line instead of the end of the
    /// stream (unix(7)).
    pub fn dismiss(&mut self, line: &str) {
        let mut unwanted = [0; 4096];
        if let Some(mut socket) = self.socket.as_ref() {
            for _ in 0..MAX_UNWANTED / unwanted.len() {
                if !matches!(socket.read(&mut unwanted), Ok(1..)) {
                    break;
                }
            }
        }
        self.say(line);
        self.close_socket();
    }

    /// Writes as much of the backlog as the socket takes.
    pub fn flush(&mut self) {
        while let Some(mut socket) = self.socket.as_ref().filter(|_| !self.backlog.is_empty()) {
            match socket.write(self.backlog.as_slices().0) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.lose_host_reader(),
            }
        }
        // An idle connection keeps no memory.
        self.backlog = VecDeque::new();
    }

    /// Whether bytes wait for room in the host socket.
    #[must_use]
    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The host will not read any more: what it has not read is dropped.
    pub fn lose_host_reader(&mut self) {
        self.host_gone = true;
        self.backlog = VecDeque::new();
        self.forwarded = self.received;
    }

    // ---- towards the guest ------------------------------------------------

    /// The event loop saw bytes or the end of the stream in the host socket.
    pub fn set_readable(&mut self) {
        self.readable = true;
    }

    /// Bytes that may be read from the host and sent to the guest now.
    #[must_use]
    pub fn readable_bytes(&self) -> u32 {
        let open = self.phase == Phase::Established
            && self.readable
            && !self.host_eof
            && self.guest_done & shutdown::RECEIVE == 0;
        if open {
            self.credit().min(self.burst)
        } else {
            0
        }
    }

    /// Reads from the host socket into the collected buffers, which hold
    /// `offered` bytes; returns how many were filled.
    pub fn fill<M: GuestMemory>(&mut self, slices: &mut Slices<'_, M>, offered: u32) -> u32 {
        let Some(socket) = &self.socket else {
            self.host_eof = true;
            return 0;
        };
        match slices.receive_from(socket.as_fd()) {
            Ok(0) => {
                self.host_eof = true;
                0
            }
            Ok(count) => {
                // No more than `offered`, which is a u32.
                let count = count as u32;
                self.sent = self.sent.wrapping_add(count);
                self.burst = if count == offered {
                    (self.burst * 2).min(BURST.end)
                } else {
                    count.next_multiple_of(BURST.start).min(BURST.end)
                };
                count
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                0
            }
            // The client closed with bytes unread (ECONNRESET): it is gone both ways.
            Err(_) => {
                self.host_eof = true;
                self.lose_host_reader();
                0
            }
        }
    }

    // ---- ends ---------------------------------------------------------------

    /// The guest will no longer do what `flags` say.
    pub fn guest_shutdown(&mut self, flags: u32) {
        self.guest_done |= flags & shutdown::BOTH;
    }

    /// The guest has closed the connection completely.
    #[must_use]
    pub fn guest_closed(&self) -> bool {
        self.guest_done == shutdown::BOTH
    }

    /// Carries the guest's shutdown over to the host socket, as far as the
    /// backlog allows.
    pub fn apply_guest_shutdown(&mut self) {
        let Some(socket) = &self.socket else { return };
        let may_close = self.guest_done & shutdown::SEND != 0 && self.backlog.is_empty();
        if may_close && !self.write_closed {
            self.write_closed = true;
            // Fails only when the peer is gone, which its own event reports.
            let _ = socket.shutdown(Shutdown::Write);
        }
        if self.guest_done & shutdown::RECEIVE != 0 && !self.read_closed {
            self.read_closed = true;
            let _ = socket.shutdown(Shutdown::Read);
        }
    }

    /// Nothing can be transferred in either direction any more.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        let to_host = self.host_gone || self.write_closed;
        let to_guest = self.host_eof || self.guest_done & shutdown::RECEIVE != 0;
        to_host && to_guest
    }

    /// Shutdown flags that the guest has to hear, if any are new.
    #[must_use]
    pub fn shutdown_due(&self) -> Option<u32> {
        let mut flags = 0;
        if self.host_eof {
            flags |= shutdown::SEND;
        }
        if self.host_gone {
            flags |= shutdown::RECEIVE;
        }
        if self.phase == Phase::Closing {
            flags = shutdown::BOTH;
        }
        (flags & !self.told != 0).then_some(flags)
    }

    /// Closes the host socket.
    pub fn close_socket(&mut self) {
        self.socket = None;
        self.backlog = VecDeque::new();
    }

    /// Descriptor number, for the event loop.
    #[must_use]
    pub fn raw_fd(&self) -> Option<i32> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether there is a packet for the guest.
    #[must_use]
    pub fn has_work(&self) -> bool {
        match self.phase {
            Phase::Greeting | Phase::Draining => false,
            Phase::Requested { sent } => !sent,
            Phase::Closing => self.shutdown_due().is_some(),
            Phase::Established => {
                self.response_due
                    || self.credit_update_due()
                    || self.shutdown_due().is_some()
                    || self.readable_bytes() > 0
            }
        }
    }
}
