//! The connection to a back end: what is negotiated when the device is made, and what
//! is said when its driver starts and stops it.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;

use super::super::mailbox::{Mailbox, Request};
use super::kinds::{Kind, Space};
use crate::vm::builtin::virtio::registers::{Identity, QueueSetup};
use crate::vm::builtin::virtio::rings::Events;
use crate::vm::builtin::virtio::worker::{Own, Service, ServiceRing};
use crate::vm::devices::vhost_user::lock;

/// That protocol features and enabling queues are there.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// What is used of the protocol if the back end has it.
const PROTOCOL: Protocol = Protocol::MQ
    .union(Protocol::REPLY_ACK)
    .union(Protocol::CONFIG)
    .union(Protocol::RESET_DEVICE);

/// Added to the guest's addresses, which makes what the protocol calls addresses of
/// the front end: the program has no need of this process's.
const ADDRESS_BASE: u64 = 1 << 46;

/// Event of the connection, and of the mailbox.
const HANG_UP: u64 = 0;
const MAIL: u64 = 1;

/// A negotiated connection.
pub struct Link {
    frontend: Frontend,
    memory: GuestMemoryMmap,
    /// The back end's features.
    features: u64,
    protocol: Protocol,
    /// Numbers of the queues that the driver has started.
    started: Vec<usize>,
}

impl Link {
    /// Asks the back end what it is.
    ///
    /// # Errors
    /// It does not speak the protocol, or is not fit for this kind of device.
    pub fn negotiate(
        stream: UnixStream,
        memory: GuestMemoryMmap,
        kind: &Kind,
    ) -> io::Result<(Link, Identity)> {
        let mut queues = kind.queues.clone();
        let mut frontend = Frontend::from_stream(stream, queues.len() as u64);
        frontend.set_owner().map_err(protocol)?;
        let features = frontend.get_features().map_err(protocol)?;
        let mut agreed = Protocol::empty();
        if features & PROTOCOL_FEATURES != 0 {
            agreed = frontend.get_protocol_features().map_err(protocol)? & PROTOCOL;
            frontend.set_protocol_features(agreed).map_err(protocol)?;
        }
        if agreed.contains(Protocol::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if agreed.contains(Protocol::MQ) {
            let most = frontend.get_queue_num().map_err(protocol)?;
            queues.truncate(usize::try_from(most).unwrap_or(usize::MAX));
        } else if kind.min_queues == 1 {
            queues.truncate(1);
        }
        if queues.len() < kind.min_queues {
            return Err(unfit("has too few queues"));
        }
        let mut space = match &kind.config {
            Space::Own(space) => space.clone(),
            Space::BackEnd(_) if !agreed.contains(Protocol::CONFIG) => {
                return Err(unfit("does not say what it serves (CONFIG)"));
            }
            Space::BackEnd(len) => {
                let nothing = vec![0; *len as usize];
                let flags = VhostUserConfigFlags::empty();
                let (_, space) = frontend
                    .get_config(0, *len, flags, &nothing)
                    .map_err(protocol)?;
                space
            }
        };
        let mut offered = features & kind.features;
        if offered & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(unfit("does not know virtio 1.0"));
        }
        offered |= kind.own_features;
        kind.settle(&mut offered, &mut space, queues.len());
        let identity = Identity {
            id: kind.id,
            features: offered,
            queues,
            config: space.into(),
        };
        let link = Link {
            frontend,
            memory,
            features,
            protocol: agreed,
            started: Vec::new(),
        };
        Ok((link, identity))
    }

    /// The whole memory, with the room for more: what the guest cannot touch is part
    /// of the file all the same.
    fn share_memory(&self) -> vhost::Result<()> {
        let regions = self.memory.iter().filter_map(|region| {
            let file = region.file_offset()?;
            let address = region.start_addr().raw_value();
            Some(VhostUserMemoryRegionInfo {
                guest_phys_addr: address,
                memory_size: region.len(),
                userspace_addr: ADDRESS_BASE + address,
                mmap_offset: file.start(),
                mmap_handle: file.file().as_raw_fd(),
            })
        });
        let regions: Vec<_> = regions.collect();
        self.frontend.set_mem_table(&regions)
    }

    /// Has the back end work on the queues.
    fn start(
        &mut self,
        features: u64,
        queues: &[QueueSetup],
        sizes: &[u16],
        events: &Events,
    ) -> vhost::Result<()> {
        let has_protocol = self.features & PROTOCOL_FEATURES;
        self.frontend
            .set_features(features & self.features | has_protocol)?;
        self.share_memory()?;
        for (number, queue) in queues.iter().enumerate() {
            let (Some(size), Some(kick)) = (sizes.get(number), events.kicks.get(number)) else {
                break;
            };
            if !queue.ready {
                continue;
            }
            let address = |address: u64| ADDRESS_BASE.wrapping_add(address);
            let config = VringConfigData {
                queue_max_size: *size,
                queue_size: queue.size,
                flags: 0,
                desc_table_addr: address(queue.descriptors),
                used_ring_addr: address(queue.used),
                avail_ring_addr: address(queue.available),
                log_addr: None,
            };
            // From now on it has to be stopped, however far this gets.
            self.started.push(number);
            self.frontend.set_vring_num(number, queue.size)?;
            self.frontend.set_vring_base(number, 0)?;
            self.frontend.set_vring_addr(number, &config)?;
            self.frontend.set_vring_call(number, &events.call)?;
            self.frontend.set_vring_kick(number, kick)?;
            if has_protocol != 0 {
                self.frontend.set_vring_enable(number, true)?;
            }
            // There may be something in it already. Fails only when the counter is
            // full, that is, when it is set.
            let _ = kick.write(1);
        }
        Ok(())
    }

    /// Has the back end leave the queues alone.
    fn stop(&mut self) -> vhost::Result<()> {
        for number in std::mem::take(&mut self.started) {
            if self.features & PROTOCOL_FEATURES != 0 {
                self.frontend.set_vring_enable(number, false)?;
            }
            // What it says does not matter: the next driver starts anew.
            self.frontend.get_vring_base(number)?;
        }
        if self.protocol.contains(Protocol::RESET_DEVICE) {
            self.frontend.reset_device()?;
        }
        Ok(())
    }
}

fn protocol(e: vhost::Error) -> io::Error {
    io::Error::other(format!("vhost-user: {e}"))
}

fn unfit(why: &str) -> io::Error {
    io::Error::other(format!("the vhost-user back end {why}"))
}

/// The device's thread: does what the driver asks for, and notices the back end's end.
pub struct LinkService {
    link: Mutex<Link>,
    pub identity: Identity,
    pub events: Arc<Events>,
    mailbox: Arc<Mailbox>,
    id: String,
    /// See [`Kind::when_lost`].
    when_lost: Option<(usize, u16)>,
}

impl LinkService {
    pub fn new(
        link: Link,
        identity: Identity,
        when_lost: Option<(usize, u16)>,
        events: Arc<Events>,
        mailbox: Arc<Mailbox>,
        id: String,
    ) -> LinkService {
        LinkService {
            link: Mutex::new(link),
            identity,
            events,
            mailbox,
            id,
            when_lost,
        }
    }

    /// Whether it is done.
    pub fn answer(&self, request: Request) -> bool {
        let mut link = lock(&self.link);
        let done = match request {
            Request::Start(features, queues) => {
                let sizes = &self.identity.queues;
                link.start(features, &queues, sizes, &self.events)
            }
            Request::Stop => link.stop(),
        };
        match done {
            Ok(()) => true,
            Err(e) => {
                self.fail(&e);
                false
            }
        }
    }

    /// The device is of no use any more; the machine is.
    fn fail(&self, why: &dyn std::fmt::Display) {
        if !self.identity.config.has_failed() {
            log::warn!("the vhost-user back end of {} is lost: {why}", self.id);
            if let Some((at, value)) = self.when_lost {
                self.identity.config.change_short(at, value);
            }
            self.identity.config.fail();
            // Fails only when the counter is full, that is, when it is set already.
            let _ = self.events.call.write(1);
        }
    }
}

impl Drop for LinkService {
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

impl Service for LinkService {
    type Bitmap = ();

    fn handle(&self, event: u16, _: &[ServiceRing<()>]) -> io::Result<()> {
        if u64::from(event) == MAIL {
            self.mailbox.answer(|request| self.answer(request));
        } else {
            self.fail(&"it has ended");
        }
        Ok(())
    }

    fn own_events(&self) -> Vec<Own> {
        let connection = lock(&self.link).frontend.as_raw_fd();
        // A connection stays hung up: once is enough.
        let hang_up = EventSet::READ_HANG_UP | EventSet::ONE_SHOT;
        vec![
            (connection, HANG_UP, hang_up),
            (self.mailbox.event.as_raw_fd(), MAIL, EventSet::IN),
        ]
    }
}
