//! The file system device as a vhost-user back end.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringState, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::FileServer;
use crate::vm::devices::throttle::Throttle;
use crate::vm::devices::vhost_user::{Ring, is_running, panic_text};

/// The bitmap is the file server's choice; nothing is ever logged in it.
type GuestMemory = GuestMemoryMmap<BitmapMmapRegion>;
type Memory = GuestMemoryAtomic<GuestMemory>;

/// One for urgent requests, one for the others.
const QUEUES: usize = 2;
const QUEUE_SIZE: usize = 1024;

/// The file server and what the worker needs to run it.
pub struct Backend {
    server: FileServer,
    memory: Mutex<Option<Memory>>,
    noise: Mutex<Throttle>,
}

impl Backend {
    pub fn new(server: FileServer) -> Arc<Self> {
        Arc::new(Self {
            server,
            memory: Mutex::new(None),
            noise: Mutex::new(Throttle::default()),
        })
    }

    /// Answers all requests of a ring.
    fn pump(&self, ring: &Ring<Memory>, memory: &GuestMemory) -> Result<(), virtio_queue::Error> {
        let mut state = ring.get_mut();
        if !is_running(&state) {
            return Ok(());
        }
        loop {
            let Some(chain) = state.get_queue_mut().iter(memory)?.next() else {
                if state.enable_notification()? {
                    // The guest added something before it was told to kick.
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let len = self.answer(memory, chain);
            state.add_used(head, len)?;
            self.signal(&mut state);
        }
    }

    /// Answers a request and returns how many bytes of its buffers were written.
    fn answer(&self, memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>) -> u32 {
        // A request the server cannot understand is returned unanswered, which
        // the guest's driver takes as an I/O error.
        let answer = || -> Result<usize, Box<dyn std::error::Error>> {
            let reader = Reader::new(memory, chain.clone())?;
            let writer = Writer::new(memory, chain)?;
            Ok(self
                .server
                .handle_message(reader, writer, None::<&mut ()>)?)
        };
        // The server checks most of what the guest says, but not all of it; a
        // panic must cost the guest its request and not the VM its device.
        match catch_unwind(AssertUnwindSafe(answer)) {
            Ok(Ok(len)) => u32::try_from(len).unwrap_or(0),
            Ok(Err(e)) => {
                self.complain(&e);
                0
            }
            Err(panic) => {
                self.complain(&panic_text(&*panic));
                0
            }
        }
    }

    /// Interrupts the guest, if it wants to hear about the used buffers.
    fn signal(&self, state: &mut VringState<Memory>) {
        // When in doubt, interrupt: at worst it is one too many.
        if state.needs_notification().unwrap_or(true) {
            if let Err(e) = state.signal_used_queue() {
                self.complain(&e);
            }
        }
    }

    fn complain(&self, what: &dyn std::fmt::Display) {
        let mut noise = self.noise.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(suppressed) = noise.admit() {
            log::warn!("fs: request: {what} ({suppressed} similar lines suppressed)");
        }
    }
}

impl VhostUserBackend for Backend {
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
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        rings: &[Ring<Memory>],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(memory) = memory.as_ref().map(GuestAddressSpace::memory) else {
            return Ok(());
        };
        if let Some(ring) = rings.get(usize::from(event)) {
            if let Err(e) = self.pump(ring, &memory) {
                self.complain(&e);
            }
        }
        Ok(())
    }
}
