//! Packets that the guest has sent.

use std::ops::Range;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemory;

use super::super::connection::{Connection, Phase, Ports};
use super::super::packet::{
    HEADER_LEN, HOST_CID, Header, Malformed, Slices, TYPE_STREAM, op, shutdown,
};
use super::super::table::Token;
use super::{Device, MAX_CONNECTIONS, MAX_GUEST_CONNECTIONS, MAX_REPLIES, Progress};

/// Packets processed by one call of [`Device::transmit`].
const BATCH: usize = 16;

impl Device {
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
        for _ in 0..BATCH {
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
    pub(super) fn guest_left(&mut self, token: Token) {
        self.table.unpublish(token);
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        if matches!(connection.phase, Phase::Greeting | Phase::Requested { .. }) {
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
}
