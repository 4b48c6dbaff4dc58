//! Packets for the guest.

use std::ops::Range;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemory;

use super::super::connection::Phase;
use super::super::packet::{HEADER_LEN, Header, Slices, op};
use super::super::table::Token;
use super::{Device, Progress};

impl Device {
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
        let Some(connection) = self.table.get(token).filter(|c| c.has_work()) else {
            return Ok(true);
        };
        let opening = match connection.phase {
            Phase::Requested { .. } => Some(op::REQUEST),
            Phase::Established if connection.response_due => Some(op::RESPONSE),
            _ => None,
        };
        if let Some(op) = opening {
            let header = connection.header(guest_cid, op);
            if !self.put_for(mem, queue, slices, token, &header)? {
                return Ok(false);
            }
        }
        if !self.send_data(mem, queue, slices, token)? {
            return Ok(false);
        }
        let Some(connection) = self.table.get(token).filter(|c| c.has_work()) else {
            return Ok(true);
        };
        let (op, flags) = match connection.shutdown_due() {
            Some(flags) => (op::SHUTDOWN, flags),
            None if connection.credit_update_due() => (op::CREDIT_UPDATE, 0),
            None => return Ok(true),
        };
        let mut header = connection.header(guest_cid, op);
        header.flags = flags;
        self.put_for(mem, queue, slices, token, &header)
    }

    /// As [`Device::put`], for a packet of a connection, which hears of it.
    fn put_for<'m, M: GuestMemory>(
        &mut self,
        mem: &'m M,
        queue: &mut Queue,
        slices: &mut Slices<'m, M>,
        token: Token,
        header: &Header,
    ) -> Result<bool, virtio_queue::Error> {
        let sent = self.put(mem, queue, slices, header)?;
        if sent && let Some(connection) = self.table.get_mut(token) {
            connection.has_sent(header);
        }
        Ok(sent)
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
            connection.has_sent(&header);
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
        // No more than the ring holds, or a guest that adds buffers without room for payload
        // as fast as they are taken would keep the device here, and have it remember them.
        for _ in 0..queue.size() {
            if wanted == 0 {
                break;
            }
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
}

/// A receive buffer that has been taken from the ring.
#[derive(Debug)]
struct Buffer {
    head: u16,
    slices: Range<usize>,
    /// Bytes of payload to put into it.
    room: u32,
}
