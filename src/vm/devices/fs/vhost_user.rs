//! The file system device as a vhost-user back end.

use std::io;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringState, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::Error as QueueError;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::passthrough::PassthroughFs;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use super::device::{Device, GuestMemory};
use super::guard::Guard;
use crate::vm::devices::vhost_user::{ExitEvent, Ring, Status, guarded, is_running, lock};

type Memory = GuestMemoryAtomic<GuestMemory>;

/// One for urgent requests, one for the others.
const QUEUES: usize = 2;
const QUEUE_SIZE: usize = 1024;

/// Requests answered before the ring is let go for a moment.
const BATCH: usize = 64;

/// The device and what the worker needs to run it.
pub struct Backend<F = PassthroughFs>
where
    Guard<F>: FileSystem + Sync,
{
    device: Device<F>,
    exit: ExitEvent,
    status: Arc<Status>,
    memory: Mutex<Option<Memory>>,
}

impl<F> Backend<F>
where
    Guard<F>: FileSystem + Sync,
{
    /// # Errors
    /// No descriptor is to be had.
    pub fn new(device: Device<F>, status: Arc<Status>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            device,
            exit: ExitEvent::new()?,
            status,
            memory: Mutex::new(None),
        }))
    }

    /// Answers all requests of a ring. In between, the VMM gets its turn to stop it.
    fn pump(&self, ring: &Ring<Memory>, memory: &GuestMemory) -> Result<(), QueueError> {
        while self.pump_some(ring, memory)? {}
        Ok(())
    }

    /// Answers some requests; `true` if there are more.
    fn pump_some(&self, ring: &Ring<Memory>, memory: &GuestMemory) -> Result<bool, QueueError> {
        let mut state = ring.get_mut();
        if !is_running(&state) {
            return Ok(false);
        }
        for _ in 0..BATCH {
            if !self.device.answer_next(memory, state.get_queue_mut())? {
                // `true` if the guest added something before it was told to kick.
                return state.enable_notification();
            }
            self.signal(&mut state);
        }
        Ok(true)
    }

    /// Interrupts the guest, if it wants to hear about the used buffers.
    fn signal(&self, state: &mut VringState<Memory>) {
        // When in doubt, interrupt: at worst it is one too many.
        if state.needs_notification().unwrap_or(true)
            && let Err(e) = state.signal_used_queue()
        {
            self.device.complain(&e);
        }
    }
}

impl<F: Send + Sync> VhostUserBackend for Backend<F>
where
    Guard<F>: FileSystem + Sync,
{
    type Bitmap = BitmapMmapRegion;
    type Vring = Ring<Memory>;

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

    // Not CONFIG: the VMM knows the tag and the number of queues itself, and QEMU
    // 7.1 to 8.0 crash when a back end of this device offers it.
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    // The rings know it themselves.
    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *lock(&self.memory) = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit.take()
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        rings: &[Ring<Memory>],
        _thread: usize,
    ) -> io::Result<()> {
        guarded(&self.status, || {
            let memory = lock(&self.memory).as_ref().map(GuestAddressSpace::memory);
            let (Some(memory), Some(ring)) = (memory, rings.get(usize::from(event))) else {
                return;
            };
            if let Err(e) = self.pump(ring, &memory) {
                self.device.complain(&e);
            }
        });
        Ok(())
    }
}
