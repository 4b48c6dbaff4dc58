//! Moving frames between a pair of queues and the interface, in this process.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vhost_user_backend::{VringState, VringT};
use virtio_queue::{Error as QueueError, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::super::{BATCH, buffers, interrupt, work_some};
use super::{HEADER_LEN, Net, feature};
use crate::vm::builtin::virtio::worker::{Own, Service, ServiceMemory, ServiceRing};
use crate::vm::devices::vhost_user::{is_running, lock};

/// Events: the two queues, and frames of the interface.
const TAP: u64 = 2;
/// The longest frame, 64 KiB of segments with a header, and room for tags.
const MAX_FRAME: usize = HEADER_LEN + 65536 + 64;
/// Where the header has the number of buffers of a frame.
const BUFFERS_AT: usize = 10;

pub struct Pair {
    net: Arc<Net>,
    number: usize,
    memory: ServiceMemory<()>,
    frame: Mutex<Frame>,
}

/// A frame of the interface that waits for buffers of the guest.
struct Frame {
    bytes: Vec<u8>,
    len: usize,
}

/// What became of a frame.
enum Delivery {
    Done,
    /// There are too few buffers, or there were: `more` have come meanwhile.
    Waits {
        more: bool,
    },
}

impl Pair {
    pub fn new(net: &Arc<Net>, number: usize, memory: ServiceMemory<()>) -> Pair {
        Pair {
            net: net.clone(),
            number,
            memory,
            frame: Mutex::new(Frame {
                bytes: vec![0; MAX_FRAME],
                len: 0,
            }),
        }
    }
}

impl Service for Pair {
    type Bitmap = ();

    fn handle(&self, _event: u16, rings: &[ServiceRing<()>]) -> io::Result<()> {
        let [receive, transmit] = rings else {
            return Ok(());
        };
        let memory = self.memory.memory();
        // In turns, so that neither direction can hold the other up.
        loop {
            let sent = self.transmit_some(transmit, &memory);
            let received = self.receive_some(receive, &memory);
            if !sent && !received {
                return Ok(());
            }
        }
    }

    fn own_events(&self) -> Vec<Own> {
        // Only news, because frames stay where they are as long as the guest has no
        // room for them.
        let fd = self.net.taps.get(self.number).map(|tap| tap.raw_fd());
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let open = fd.into_iter().filter(|fd| *fd >= 0);
        open.map(|fd| (fd, TAP, set)).collect()
    }
}

impl Pair {
    /// `true` when there may be more to be sent.
    fn transmit_some(&self, ring: &ServiceRing<()>, memory: &GuestMemoryMmap) -> bool {
        let tap = self.net.taps[self.number].file();
        work_some("net", ring, memory, &mut |memory, chain| {
            if let Some((frame, _)) = buffers::of_chain(memory, chain)
                && let Some(tap) = &*tap
            {
                send(tap, &frame);
            }
            0
        })
    }

    /// `true` when there may be more to be received.
    fn receive_some(&self, ring: &ServiceRing<()>, memory: &GuestMemoryMmap) -> bool {
        let tap = self.net.taps[self.number].file();
        let Some(tap) = &*tap else {
            return false;
        };
        let some = || -> Result<bool, QueueError> {
            let mut state = ring.get_mut();
            let mut frame = lock(&self.frame);
            if !is_running(&state) {
                // What waits is for a driver that is gone.
                frame.len = 0;
                return Ok(false);
            }
            let mut delivered = false;
            for _ in 0..BATCH {
                if frame.len == 0 && !frame.read(tap) {
                    finish(&mut state, delivered);
                    return Ok(false);
                }
                let mergeable = self.net.features.load(Ordering::Acquire) & feature::MRG_RXBUF;
                match frame.deliver(&mut state, memory, mergeable != 0)? {
                    Delivery::Done => delivered = true,
                    Delivery::Waits { more } => {
                        finish(&mut state, delivered);
                        return Ok(more);
                    }
                }
            }
            finish(&mut state, delivered);
            Ok(true)
        };
        some().unwrap_or_else(|e| {
            // The guest has broken its ring; it is useless until the next reset.
            log::debug!("net: receive ring: {e}");
            false
        })
    }
}

fn finish(state: &mut VringState<ServiceMemory<()>>, delivered: bool) {
    if delivered {
        interrupt(state);
    }
}

/// A frame the interface does not take is lost, as on every wire.
fn send(tap: &File, frame: &buffers::Buffers<'_>) {
    if frame.len() <= HEADER_LEN || frame.len() > MAX_FRAME {
        return;
    }
    let iovecs = frame.iovecs();
    loop {
        // SAFETY: the vectors are memory of the guest, which stays mapped. At most 1024.
        let sent = unsafe {
            libc::writev(
                tap.as_raw_fd(),
                iovecs.as_ptr(),
                iovecs.len() as libc::c_int,
            )
        };
        if sent >= 0 {
            return;
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return log::trace!("net: sending: {e}");
        }
    }
}

impl Frame {
    /// Takes the next frame of the interface; `false` when there is none.
    fn read(&mut self, tap: &File) -> bool {
        loop {
            let mut tap = tap;
            match tap.read(&mut self.bytes) {
                Ok(len) if len > HEADER_LEN => {
                    self.len = len;
                    return true;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Not a frame, which an interface does not give.
                Ok(_) => return false,
                Err(e) => {
                    if e.kind() != io::ErrorKind::WouldBlock {
                        log::debug!("net: receiving: {e}");
                    }
                    return false;
                }
            }
        }
    }

    /// Gives the frame to the guest: in one buffer, or in as many as it takes if they
    /// may be merged.
    fn deliver(
        &mut self,
        state: &mut VringState<ServiceMemory<()>>,
        memory: &GuestMemoryMmap,
        mergeable: bool,
    ) -> Result<Delivery, QueueError> {
        let mut used: Vec<(u16, u32)> = Vec::new();
        let mut first = None;
        let mut done = 0;
        while done < self.len {
            let queue = state.get_queue_mut();
            // More than a ring of them there cannot be.
            if used.len() >= usize::from(queue.size()) {
                return Err(QueueError::InvalidAvailRingIndex);
            }
            let Some(chain) = queue.iter(memory)?.next() else {
                // The guest is to kick when there is another one; those that are there
                // do not suffice.
                let more = state.enable_notification()?;
                for _ in &used {
                    state.get_queue_mut().go_to_previous_position();
                }
                return Ok(Delivery::Waits { more });
            };
            let head = chain.head_index();
            let room = buffers::of_chain(memory, chain).map(|(_, writable)| writable);
            let is_fit = |room: &buffers::Buffers<'_>| match (mergeable, used.is_empty()) {
                (true, true) => room.len() >= HEADER_LEN,
                (true, false) => room.len() > 0,
                (false, _) => room.len() >= self.len,
            };
            let Some(room) = room.filter(is_fit) else {
                // Of no use: it goes back, and the frame is lost if nothing else would
                // ever fit.
                if !used.is_empty() {
                    return Err(QueueError::InvalidChain);
                }
                self.len = 0;
                state.add_used(head, 0)?;
                return Ok(Delivery::Done);
            };
            let written = room.write(&self.bytes[done..self.len]);
            done += written;
            // A frame is far shorter than 4 GiB.
            used.push((head, written as u32));
            first.get_or_insert(room);
        }
        if let Some(first) = first {
            // As many as the ring has at most.
            first.write_at(BUFFERS_AT, &(used.len() as u16).to_le_bytes());
        }
        for (head, len) in used {
            state.add_used(head, len)?;
        }
        self.len = 0;
        Ok(Delivery::Done)
    }
}
