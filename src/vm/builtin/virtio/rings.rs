//! The queues of one device, between its registers and its worker.
//!
//! Both sides have them: the registers, on the threads of the guest's processors,
//! start and stop them ([`SharedRings`] is the registers' view); the worker works
//! on those that run ([`super::worker`]). A ring's lock is what makes a stop
//! certain: who works on it holds the lock.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::Arc;

use vhost_user_backend::VringT;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::registers::{QueueSetup, Rings};
use super::saved::Position;
use crate::vm::devices::vhost_user::Ring;

/// The event descriptors of a slot. KVM signals and is signalled by them.
#[derive(Debug)]
pub struct Events {
    /// One for each queue: the guest has put something into it.
    pub kicks: Vec<EventFd>,
    /// The interrupt line.
    pub call: EventFd,
    /// The guest has seen an interrupt of a queue. Nobody waits for it: KVM takes it
    /// without leaving the guest's processor.
    pub seen: EventFd,
}

impl Events {
    /// # Errors
    /// No descriptor is to be had.
    pub fn new(queues: usize) -> io::Result<Events> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        Ok(Events {
            kicks: (0..queues).map(|_| event()).collect::<io::Result<_>>()?,
            call: event()?,
            seen: event()?,
        })
    }
}

/// The queues of one device.
pub struct SharedRings<M: GuestAddressSpace> {
    rings: Vec<Ring<M>>,
    events: Arc<Events>,
}

impl<M: GuestAddressSpace + Clone + 'static> SharedRings<M> {
    /// Queues of these largest sizes. Only the first of them are the device's to
    /// work on if there are more `sizes` than it has queues.
    ///
    /// # Errors
    /// A size is not one of a queue, or no descriptor is to be had.
    pub fn new(memory: &M, sizes: &[u16], events: Arc<Events>) -> io::Result<Self> {
        let rings = sizes.iter().map(|size| {
            let ring = Ring::new(memory.clone(), *size).map_err(io::Error::other)?;
            // SAFETY: the descriptor was just duplicated and belongs to nobody else.
            let call = unsafe { File::from_raw_fd(events.call.try_clone()?.into_raw_fd()) };
            ring.set_call(Some(call));
            Ok(ring)
        });
        let rings = rings.collect::<io::Result<_>>()?;
        Ok(SharedRings { rings, events })
    }

    /// For the worker.
    pub fn rings(&self) -> Vec<Ring<M>> {
        self.rings.clone()
    }
}

impl<M: GuestAddressSpace + Clone + Send + Sync + 'static> Rings for SharedRings<M>
where
    Ring<M>: Send,
{
    fn start(&mut self, features: u64, queues: &[QueueSetup]) -> bool {
        self.go_on(features, queues, &vec![Position::default(); queues.len()])
    }

    fn go_on(&mut self, features: u64, queues: &[QueueSetup], positions: &[Position]) -> bool {
        let event_index = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for ((ring, queue), position) in self.rings.iter().zip(queues).zip(positions) {
            if !queue.ready {
                continue;
            }
            ring.set_queue_size(queue.size);
            let set = ring.set_queue_info(queue.descriptors, queue.available, queue.used);
            if set.is_err() {
                self.stop();
                return false;
            }
            ring.set_queue_event_idx(event_index);
            ring.set_queue_next_avail(position.available);
            ring.set_queue_next_used(position.used);
            ring.set_queue_ready(true);
            ring.set_enabled(true);
        }
        // There may be something in them already.
        for kick in &self.events.kicks {
            // Fails only when the counter is full, that is, when it is set already.
            let _ = kick.write(1);
        }
        true
    }

    fn freeze(&mut self) -> Option<Vec<Position>> {
        // Nobody works on them any more when this returns.
        self.stop();
        let position = |ring: &Ring<M>| Position {
            available: ring.queue_next_avail(),
            used: ring.get_ref().get_queue().next_used(),
        };
        Some(self.rings.iter().map(position).collect())
    }

    fn stop(&mut self) {
        for ring in &self.rings {
            ring.set_enabled(false);
            ring.set_queue_ready(false);
        }
    }
}
