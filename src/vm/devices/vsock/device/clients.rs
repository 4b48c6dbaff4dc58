//! What happens on the host: clients, sockets, deadlines.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::super::connection::{Connection, Phase, Ports};
use super::super::host::{Event, Greeting, read_greeting};
use super::super::packet::op;
use super::super::table::Token;
use super::{Device, FIRST_CLIENT_PORT, MAX_CONNECTIONS, SMALL_WINDOW, WINDOWS};

/// How long a client may take to send its CONNECT line.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest may take to answer a REQUEST.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long clients may take to collect their data after the VM has ended, and
/// how long they may pause.
const FINISH_TIMEOUT: Duration = Duration::from_secs(10);
const FINISH_PATIENCE: Duration = Duration::from_secs(2);

impl Device {
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

    /// The VM is gone: delivers what the guest had sent to clients that take it,
    /// and closes everything else.
    pub fn finish(&mut self) {
        self.host.stop_listening();
        for token in self.table.select(|c| c.phase != Phase::Draining) {
            self.guest_left(token);
        }
        let end = Instant::now() + FINISH_TIMEOUT;
        while self.table.len() > 0 {
            let patience = FINISH_PATIENCE.min(end.saturating_duration_since(Instant::now()));
            if !self.host.wait(patience) {
                log::warn!(
                    "vsock: {} clients did not take their data",
                    self.table.len()
                );
                return;
            }
            self.host_events();
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

    pub(super) fn window(&self) -> u32 {
        let others = self.table.len();
        WINDOWS
            .iter()
            .find(|(connections, _)| others < *connections)
            .map_or(SMALL_WINDOW, |(_, window)| *window)
    }

    /// Puts a connection into the table and under watch.
    pub(super) fn add(&mut self, connection: Connection) -> Option<Token> {
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

    pub(super) fn remove(&mut self, token: Token) {
        let Some(connection) = self.table.get(token) else {
            return;
        };
        self.from_guest -= usize::from(connection.from_guest);
        if connection.queued {
            // Or a guest that takes no packets, and opens and resets connections,
            // would make the list grow.
            self.ready.retain(|&queued| queued != token);
        }
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

    #[cfg(any(test, fuzzing))]
    pub fn connections(&self) -> usize {
        self.table.len()
    }

    /// Packets and turns that wait for receive buffers.
    #[cfg(any(test, fuzzing))]
    pub fn waiting(&self) -> (usize, usize) {
        (self.replies.len(), self.ready.len())
    }

    /// Lets every deadline pass.
    #[cfg(any(test, fuzzing))]
    pub fn expire_all(&mut self) {
        for token in self.table.select(|c| c.deadline.is_some()) {
            self.expire(token);
        }
    }
}
