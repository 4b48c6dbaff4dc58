//! The device's core: what packets and host events do to connections.
//!
//! The owner of the virtqueues (the vhost-user glue, or the built-in VMM) calls
//! [`Device::transmit`] and [`Device::receive`] with a queue and guest memory,
//! and [`Device::host_events`] when [`Device::poll_fd`] is readable. None of
//! them waits, and each does a bounded amount of work per call.

mod clients;
mod receive;
mod transmit;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::time::{Duration, Instant};

use super::connection::{Connection, Phase};
use super::host::Host;
use super::packet::{Header, op};
use super::table::{Table, Token};
use crate::vm::devices::throttle::Throttle;

/// Most connections at a time, both kinds together.
pub const MAX_CONNECTIONS: usize = 1024;
/// Most of them that the guest may have opened, so that it cannot lock the host out.
pub const MAX_GUEST_CONNECTIONS: usize = MAX_CONNECTIONS / 2;

/// Bytes the guest may send ahead of the host on each of this many connections, in
/// the order in which they come. Together this bounds all backlogs to 52 MiB. Linux
/// uses no more than its own receive buffer, which is 256 KiB unless a program asks
/// for more, as the agent does for output.
const WINDOWS: [(usize, u32); 3] = [
    (8, LARGE_WINDOW),
    (64, MEDIUM_WINDOW),
    (MAX_CONNECTIONS, SMALL_WINDOW),
];
pub const LARGE_WINDOW: u32 = 1024 * 1024;
const MEDIUM_WINDOW: u32 = 256 * 1024;
const SMALL_WINDOW: u32 = 32 * 1024;

/// Most packets that wait for a receive buffer and belong to no connection. While
/// there are as many, no packet of the guest is processed.
const MAX_REPLIES: usize = 256;

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
        if let Some(connection) = self.table.get_mut(token)
            && connection.has_work()
            && !connection.queued
        {
            connection.queued = true;
            self.ready.push_back(token);
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
