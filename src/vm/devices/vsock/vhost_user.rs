//! The socket device as a vhost-user back end.

use std::io;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringState, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Device, Progress};
use crate::vm::devices::throttle::Throttle;
use crate::vm::devices::vhost_user::{ExitEvent, Memory, Ring, Status, guarded, is_running, lock};

/// Receive and transmit; the VMM keeps the event queue to itself.
const QUEUES: usize = 2;
const QUEUE_SIZE: usize = 1024;

/// Events besides the rings'; the library reserves the first numbers for these.
pub const HOST_EVENT: u64 = 16;
pub const CONTINUE_EVENT: u64 = 17;

/// Calls of the device's core before other events get their turn.
const ROUNDS: usize = 8;
const STEPS: usize = 32;

/// The device and what the worker needs to run it.
pub struct Backend {
    inner: Mutex<Inner>,
    exit: ExitEvent,
    status: Arc<Status>,
    /// Set when work is left that no event will announce.
    pub unfinished: EventFd,
}

type Step = fn(&mut Device, &GuestMemoryMmap, &mut Queue) -> Result<Progress, QueueError>;

struct Inner {
    device: Device,
    memory: Option<Memory>,
    noise: Throttle,
}

impl Backend {
    /// # Errors
    /// No descriptor is to be had.
    pub fn new(device: Device, status: Arc<Status>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            exit: ExitEvent::new()?,
            status,
            inner: Mutex::new(Inner {
                device,
                memory: None,
                noise: Throttle::default(),
            }),
            unfinished: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        }))
    }

    /// The VMM has gone: delivers to the host what it is still owed.
    pub fn finish(&self) {
        lock(&self.inner).device.finish();
    }
}

impl Inner {
    /// Works until there is nothing left to do, or its turn is over: `true` if
    /// work is left.
    fn run(&mut self, rings: &[Ring]) -> bool {
        let Some(memory) = self.memory.as_ref().map(GuestAddressSpace::memory) else {
            return false;
        };
        let [receive, transmit] = rings else {
            return false;
        };
        if receive.take_fresh() {
            self.device.reset();
        }
        for _ in 0..ROUNDS {
            let mut busy = self.pump(transmit, &memory, Device::transmit);
            busy |= self.pump(receive, &memory, Device::receive);
            if !busy {
                return false;
            }
        }
        true
    }

    /// Processes one ring; `true` if anything was done.
    fn pump(&mut self, ring: &Ring, memory: &GuestMemoryMmap, step: Step) -> bool {
        let mut state = ring.get_mut();
        if !is_running(&state) {
            return false;
        }
        let mut busy = false;
        for _ in 0..STEPS {
            let used = state.get_queue().next_used();
            let progress = step(&mut self.device, memory, state.get_queue_mut());
            if state.get_queue().next_used() != used {
                self.signal(&mut state);
            }
            match progress {
                Ok(Progress::More) => busy = true,
                Ok(Progress::Idle) => return busy,
                Ok(Progress::RingEmpty) => match state.enable_notification() {
                    // The guest added something before it was told to kick.
                    Ok(true) => busy = true,
                    Ok(false) => return busy,
                    Err(e) => return self.complain(&e),
                },
                Err(e) => return self.complain(&e),
            }
        }
        busy
    }

    /// Interrupts the guest, if it wants to hear about the used buffers.
    fn signal(&mut self, state: &mut VringState<Memory>) {
        // When in doubt, interrupt: at worst it is one too many.
        if state.needs_notification().unwrap_or(true)
            && let Err(e) = state.signal_used_queue()
        {
            self.complain(&e);
        }
    }

    /// Logs what is wrong with a ring; `false`, as nothing more can be done.
    fn complain(&mut self, what: &dyn std::fmt::Display) -> bool {
        if let Some(suppressed) = self.noise.admit() {
            log::warn!("vsock: ring: {what} ({suppressed} similar lines suppressed)");
        }
        false
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    // The rings know it themselves.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = lock(&self.inner).device.config();
        let end = offset.checked_add(size).map(|end| end as usize);
        end.and_then(|end| config.get(offset as usize..end))
            .map_or_else(Vec::new, <[u8]>::to_vec)
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        lock(&self.inner).memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit.take()
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        rings: &[Ring],
        _thread: usize,
    ) -> io::Result<()> {
        guarded(&self.status, || {
            let mut inner = lock(&self.inner);
            match u64::from(event) {
                HOST_EVENT => inner.device.host_events(),
                CONTINUE_EVENT => {
                    // Fails only when it was not set.
                    let _ = self.unfinished.read();
                }
                // A ring: they are all looked at anyway.
                _ => {}
            }
            if inner.run(rings) {
                // Fails only when the counter is full, that is, when it is set already.
                let _ = self.unfinished.write(1);
            }
        });
        Ok(())
    }
}
