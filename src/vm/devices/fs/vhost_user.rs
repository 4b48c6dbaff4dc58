//! The file system device as a vhost-user back end.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringState, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{DescriptorChain, Error as QueueError, QueueOwnedT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::fuse::{InHeader, Opcode, OutHeader};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use super::FileServer;
use crate::vm::devices::throttle::Throttle;
use crate::vm::devices::vhost_user::{ExitEvent, Ring, guarded, is_running, lock, panic_text};

/// The bitmap is the file server's choice; nothing is ever logged in it.
type GuestMemory = GuestMemoryMmap<BitmapMmapRegion>;
type Memory = GuestMemoryAtomic<GuestMemory>;

/// One for urgent requests, one for the others.
const QUEUES: usize = 2;
const QUEUE_SIZE: usize = 1024;

/// Requests answered before the ring is let go for a moment.
const BATCH: usize = 64;

/// The file server and what the worker needs to run it.
pub struct Backend {
    server: FileServer,
    exit: ExitEvent,
    failed: Arc<AtomicBool>,
    memory: Mutex<Option<Memory>>,
    noise: Mutex<Throttle>,
}

impl Backend {
    /// # Errors
    /// No descriptor is to be had.
    pub fn new(server: FileServer, failed: Arc<AtomicBool>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            server,
            exit: ExitEvent::new()?,
            failed,
            memory: Mutex::new(None),
            noise: Mutex::new(Throttle::default()),
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
            let Some(chain) = state.get_queue_mut().iter(memory)?.next() else {
                // `true` if the guest added something before it was told to kick.
                return state.enable_notification();
            };
            let head = chain.head_index();
            let len = self.answer(memory, chain);
            state.add_used(head, len)?;
            self.signal(&mut state);
        }
        Ok(true)
    }

    /// Answers a request and returns how many bytes of its buffers were written.
    pub(super) fn answer(&self, memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>) -> u32 {
        // A request the server cannot understand is returned unanswered, which
        // the guest's driver takes as an I/O error.
        let answer = || -> Result<usize, Box<dyn std::error::Error>> {
            let reader = Reader::new(memory, chain.clone())?;
            let writer = Writer::new(memory, chain)?;
            if writer.available_bytes() < size_of::<OutHeader>() && expects_answer(&reader)? {
                return Err("no room for the answer".into());
            }
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
        if state.needs_notification().unwrap_or(true)
            && let Err(e) = state.signal_used_queue()
        {
            self.complain(&e);
        }
    }

    fn complain(&self, what: &dyn std::fmt::Display) {
        let mut noise = lock(&self.noise);
        if let Some(suppressed) = noise.admit() {
            log::warn!("fs: request: {what} ({suppressed} similar lines suppressed)");
        }
    }
}

/// Whether a request is of a kind that is answered.
fn expects_answer(request: &Reader<'_>) -> io::Result<bool> {
    let header: InHeader = request.clone().read_obj()?;
    Ok(!matches!(
        Opcode::try_from(header.opcode),
        Ok(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt | Opcode::Destroy)
    ))
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
        guarded(&self.failed, || {
            let memory = lock(&self.memory).as_ref().map(GuestAddressSpace::memory);
            let (Some(memory), Some(ring)) = (memory, rings.get(usize::from(event))) else {
                return;
            };
            if let Err(e) = self.pump(ring, &memory) {
                self.complain(&e);
            }
        });
        Ok(())
    }
}
