//! The devices of every machine: what each is, and the thread that works on its
//! queues.
//!
//! Sockets and files are the back ends that other hypervisors get over vhost-user
//! ([`crate::vm::devices`]).

mod balloon;
pub mod block;
mod buffers;
mod console;
#[cfg(any(test, fuzzing))]
#[allow(clippy::expect_used, reason = "a fuzz target fails by panicking")]
pub mod fuzzing;
#[cfg(test)]
mod hostile;
mod mailbox;
mod more_memory;
pub mod net;
pub mod plugged;
mod rng;
#[cfg(test)]
mod test_ring;
pub mod vhost_user;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost_user_backend::{VhostUserBackend, VringState, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_bindings::virtio_ids::{VIRTIO_ID_FS, VIRTIO_ID_VSOCK};
use virtio_queue::{DescriptorChain, Error as QueueError, QueueOwnedT};
use vm_memory::mmap::NewBitmap;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use vmm_sys_util::epoll::EventSet;

use self::more_memory::{MoreMemory, Plugger};
use self::plugged::worker_thread;
use super::memory::MemoryFile;
use super::seccomp::{self, Kind};
use super::virtio::registers::{Identity, Rings};
use super::virtio::rings::{Events, SharedRings};
use super::virtio::worker::{self, Service, ServiceMemory, ServiceRing};
use crate::vm::devices::vhost_user::{Handle, is_running};
use crate::vm::devices::{fs, vsock};
use crate::vm::{BackEnds, Error, Served, VmConfig};

/// A device that waits for its slot.
pub struct Planned {
    pub identity: Identity,
    pub rings: Box<dyn Rings>,
    pub events: Arc<Events>,
}

/// All devices of a machine that is about to start.
pub struct Started {
    pub planned: Vec<Planned>,
    pub served: Vec<Served>,
    pub growth: Option<Growth>,
}

/// How the guest gets more memory.
pub struct Growth {
    more: Arc<MoreMemory>,
    events: Arc<Events>,
}

impl Growth {
    /// Lets the guest have so much besides what it was booted with.
    pub fn offer(&self, size: u64) {
        self.more.offer(size, &self.events);
    }
}

/// Features of all queues, which their common code implements.
const FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Sizes of the queues of the socket device: receive, transmit, and that of
/// events, of which there are none without migration.
const VSOCK_QUEUES: [u16; 3] = [256, 256, 16];
/// Queues of the file system: urgent requests and others.
const FS_QUEUES: [u16; 2] = [128, 1024];
/// Length of the tag in the file system's configuration (VIRTIO 1.2, 5.11.4).
const TAG_LEN: usize = 36;

/// Starts the threads of all devices. `console` takes what the guest prints on a virtio
/// console, if it has one, and never blocks.
///
/// # Errors
/// No thread or descriptor is to be had.
pub fn start(
    file: &MemoryFile,
    config: &VmConfig,
    back_ends: BackEnds,
    console: Option<OwnedFd>,
) -> Result<Started, Error> {
    let more = MoreMemory::new(file);
    let mut devices = vec![
        sockets(file, back_ends.sockets, back_ends.guest_cid),
        files(file, config, back_ends.shared),
        own(file, "rng", rng::identity(FEATURES), |memory| rng::Rng {
            memory,
        }),
        own(
            file,
            "balloon",
            balloon::identity(FEATURES, file.can_discard()),
            |memory| balloon::Balloon {
                file: file.clone(),
                memory,
            },
        ),
    ];
    if let Some(sink) = console {
        devices.push(own(
            file,
            "console",
            console::identity(FEATURES),
            |memory| console::Console::new(memory, sink.into()),
        ));
    }
    if let Some(more) = &more {
        let plugger = |memory| Plugger {
            more: more.clone(),
            memory,
        };
        devices.push(own(file, "memory", more.identity(FEATURES), plugger));
    }
    let devices: io::Result<Vec<_>> = devices.into_iter().collect();
    let devices = devices.map_err(|source| Error::Io {
        context: "cannot start a device",
        source,
    })?;
    let (planned, served): (Vec<Planned>, Vec<Served>) = devices.into_iter().unzip();
    let events = planned.last().map(|device| device.events.clone());
    Ok(Started {
        planned,
        served,
        growth: more
            .zip(events)
            .map(|(more, events)| Growth { more, events }),
    })
}

type Device = io::Result<(Planned, Served)>;

fn sockets(file: &MemoryFile, sockets: OwnedFd, guest_cid: u64) -> Device {
    let queues = Queues::<()>::new(file, &VSOCK_QUEUES)?;
    let (events, memory) = (queues.events.clone(), queues.memory.clone());
    // The last queue is nobody's.
    let rings = queues.rings.rings()[..2].to_vec();
    let handle = vsock::spawn_with(sockets, guest_cid, move |device| {
        device.backend.update_memory(memory)?;
        seccomp::confine(Kind::Sockets)?;
        let own = device.own_events();
        let own = own.map(|(fd, event)| (fd, event, EventSet::IN));
        let kicks = &events.kicks[..rings.len()];
        worker::run(&device.backend, &rings, kicks, &own, device.control)
    })?;
    let identity = Identity {
        id: VIRTIO_ID_VSOCK,
        features: FEATURES,
        queues: VSOCK_QUEUES.to_vec(),
        config: guest_cid.to_le_bytes().to_vec().into(),
    };
    Ok(queues.started(identity, "vsock", handle))
}

fn files(file: &MemoryFile, config: &VmConfig, shared: OwnedFd) -> Device {
    let queues = Queues::<fs::Bitmap>::new(file, &FS_QUEUES)?;
    let (events, memory) = (queues.events.clone(), queues.memory.clone());
    let rings = queues.rings.rings();
    let handle = fs::spawn_with(shared, move |backend, control| {
        backend.update_memory(memory)?;
        worker::run(&backend, &rings, &events.kicks, &[], control)
    })?;
    let mut space = config.fs_tag.as_bytes().to_vec();
    space.resize(TAG_LEN, 0);
    space.extend((FS_QUEUES.len() as u32 - 1).to_le_bytes());
    let identity = Identity {
        id: VIRTIO_ID_FS,
        features: FEATURES,
        queues: FS_QUEUES.to_vec(),
        config: space.into(),
    };
    Ok(queues.started(identity, "virtio-fs", handle))
}

/// A device that only this VMM has.
fn own<S>(
    file: &MemoryFile,
    name: &'static str,
    identity: Identity,
    make: impl FnOnce(ServiceMemory<()>) -> S,
) -> Device
where
    S: Service<Bitmap = ()> + Send + 'static,
{
    let queues = Queues::<()>::new(file, &identity.queues)?;
    let service = make(queues.memory.clone());
    let (events, rings) = (&queues.events, queues.rings.rings());
    let all = 0..rings.len();
    let handle = worker_thread(name, Kind::Device, service, rings, events, all)?;
    Ok(queues.started(identity, name, handle))
}

/// Requests answered before the ring is let go for a moment.
const BATCH: usize = 64;

/// Answers all requests of a ring; `answer` returns how many bytes it has written.
/// In between, the driver gets its turn to stop it.
fn work_through(
    name: &str,
    ring: &ServiceRing<()>,
    memory: &GuestMemoryMmap,
    mut answer: impl FnMut(&GuestMemoryMmap, DescriptorChain<&GuestMemoryMmap>) -> u32,
) {
    while work_some(name, ring, memory, &mut answer) {}
}

/// Answers some requests of a ring; `true` when there may be more.
fn work_some(
    name: &str,
    ring: &ServiceRing<()>,
    memory: &GuestMemoryMmap,
    answer: &mut impl FnMut(&GuestMemoryMmap, DescriptorChain<&GuestMemoryMmap>) -> u32,
) -> bool {
    let mut some = || -> Result<bool, QueueError> {
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
            let len = answer(memory, chain);
            state.add_used(head, len)?;
            interrupt(&mut state);
        }
        Ok(true)
    };
    some().unwrap_or_else(|e| {
        // The guest has broken its ring; it is useless until the next reset.
        log::debug!("{name}: ring: {e}");
        false
    })
}

/// Tells the driver about used buffers if it wants to know.
fn interrupt(state: &mut VringState<ServiceMemory<()>>) {
    // When in doubt, interrupt: at worst it is one too many.
    if state.needs_notification().unwrap_or(true) {
        // Fails only when the counter is full, that is, when it is set.
        let _ = state.signal_used_queue();
    }
}

/// Event descriptors and queues of a device.
struct Queues<B: NewBitmap + Clone + Send + Sync + 'static> {
    events: Arc<Events>,
    memory: ServiceMemory<B>,
    rings: SharedRings<ServiceMemory<B>>,
}

impl<B: NewBitmap + Clone + Send + Sync + 'static> Queues<B> {
    fn new(file: &MemoryFile, sizes: &[u16]) -> io::Result<Self> {
        let events = Arc::new(Events::new(sizes.len())?);
        let memory = GuestMemoryAtomic::new(file.map::<B>()?);
        Ok(Queues {
            rings: SharedRings::new(&memory, sizes, events.clone())?,
            events,
            memory,
        })
    }

    fn started(self, identity: Identity, name: &'static str, handle: Handle) -> (Planned, Served) {
        let planned = Planned {
            identity,
            rings: Box::new(self.rings),
            events: self.events,
        };
        (planned, Served { name, handle })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::VmSize;
    use std::fs::File;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn directory(dir: &tempfile::TempDir) -> OwnedFd {
        File::open(dir.path()).unwrap().into()
    }

    /// Outside of a VM: no guest ever answers.
    #[test]
    fn all_devices_start_confined_and_end_with_their_handles() {
        let (dir, shared) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = VmConfig {
            sandbox_dir: dir.path().into(),
            kernel: "/kernel".into(),
            initrd: "/initrd".into(),
            kernel_params: String::new(),
            size: VmSize {
                vcpus: 1,
                memory_mib: 16,
            },
            most: VmSize {
                vcpus: 1,
                memory_mib: 16,
            },
            fs_tag: "tag".into(),
            console_log: None,
            verbose_console: false,
            template: crate::vm::Templates::None,
            console: crate::config::Console::default(),
            huge_pages: crate::config::HugePages::default(),
        };
        let back_ends = BackEnds {
            sockets: directory(&dir),
            guest_cid: 3,
            shared: directory(&shared),
        };
        let file = MemoryFile::new(16 << 20, 128 << 20).unwrap();
        let (_printed, sink) = rustix::pipe::pipe().unwrap();
        let started = start(&file, &config, back_ends, Some(sink)).unwrap();
        let (planned, served) = (started.planned, started.served);
        assert!(started.growth.is_some());
        let ids: Vec<u32> = planned.iter().map(|device| device.identity.id).collect();
        assert_eq!(ids, [VIRTIO_ID_VSOCK, VIRTIO_ID_FS, 4, 5, 3, 24]);
        for device in &planned {
            device.events.kicks[0].write(1).unwrap();
        }
        // The socket device accepts and judges clients without a guest.
        let socket = dir.path().join("vsock.sock");
        let mut client = UnixStream::connect(&socket).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        client.write_all(b"nonsense\n").unwrap();
        let mut answer = String::new();
        BufReader::new(&client).read_line(&mut answer).unwrap();
        assert_eq!(answer, "ERR malformed request\n");
        for device in &served {
            assert_eq!(device.handle.failure(), None, "{}", device.name);
        }
        drop(served);
        let gone = (0..3000).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            !socket.exists()
        });
        assert!(gone, "the socket device has not ended");
    }
}
