//! virtio-net on the queues of a tap or macvtap interface (VIRTIO 1.2, 5.1).
//!
//! A pair of queues for each queue of the interface. Frames go with the headers that
//! say which checksums and segments are still to be made, so that whoever is best at
//! it makes them, or nobody when a frame never leaves the host.
//!
//! A thread of the device ([`control`]) sets up what the driver has negotiated and
//! serves the control queue. Frames are moved by the host's kernel, where vhost-net is
//! there ([`vhost`]), or else by a thread for each pair ([`pair`]).

mod control;
#[cfg(any(test, fuzzing))]
#[allow(clippy::expect_used, reason = "a fuzz target fails by panicking")]
pub mod fuzzing;
mod pair;
mod tap;
mod vhost;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use self::control::Control;
use self::pair::Pair;
use self::tap::TapQueue;
pub use self::tap::{TUNSETOFFLOAD, TUNSETQUEUE};
use self::vhost::VhostNet;
use super::mailbox::{Mailbox, Request};
use super::plugged::{BackEnd, Plugged, worker_thread};
use super::{FEATURES, Planned};
use crate::vm::NetDevice;
use crate::vm::builtin::seccomp::Kind;
use crate::vm::builtin::virtio::registers::{Identity, QueueSetup, Rings};
use crate::vm::builtin::virtio::rings::{Events, SharedRings};
use crate::vm::builtin::virtio::worker::ServiceMemory;
use crate::vm::devices::vhost_user::PoisonFree;

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// With the number of buffers, as every header since virtio 1.0 (5.1.6).
const HEADER_LEN: usize = 12;
/// Most pairs of queues: more than there are processors are of no use.
const MAX_PAIRS: usize = 64;

/// Feature bits (5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const MQ: u64 = 1 << 22;

    pub const OF_GUEST: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;
    pub const OF_HOST: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
}

/// What a device is connected to. Its threads share it.
struct Net {
    /// One for each pair.
    taps: Vec<TapQueue>,
    /// As many, or none.
    vhost: RwLock<Vec<VhostNet>>,
    /// What the driver has negotiated.
    features: AtomicU64,
    /// Held while the state of the taps' queues is changed.
    active: Mutex<()>,
}

impl BackEnd for Net {
    fn disconnect(&self) {
        // Closing them waits for the host's threads to let go of the queues.
        self.vhost.write_unpoisoned().clear();
        for tap in &self.taps {
            tap.close();
        }
    }
}

/// The device's queues, as the driver starts and stops them.
struct NetRings {
    rings: SharedRings<ServiceMemory<()>>,
    mailbox: Arc<Mailbox>,
    net: Arc<Net>,
    pairs: usize,
    /// The host's kernel works on the pairs.
    in_kernel: bool,
}

impl Rings for NetRings {
    fn start(&mut self, features: u64, queues: &[QueueSetup]) -> bool {
        // The control queue is the last only when there are all the queues.
        let mixed = features & feature::CTRL_VQ != 0 && features & feature::MQ == 0;
        if mixed && self.pairs > 1 {
            return false;
        }
        self.net.features.store(features, Ordering::Release);
        let mut queues = queues.to_vec();
        if !self.mailbox.ask(Request::Start(features, queues.clone())) {
            return false;
        }
        if self.in_kernel {
            for queue in queues.iter_mut().take(2 * self.pairs) {
                queue.ready = false;
            }
        }
        let started = self.rings.start(features, &queues);
        if !started {
            let _ = self.mailbox.ask(Request::Stop);
        }
        started
    }

    fn stop(&mut self) {
        self.rings.stop();
        if !self.mailbox.ask(Request::Stop) {
            log::warn!("a network device has not stopped");
        }
    }
}

/// Makes a device of an interface's queues.
///
/// # Errors
/// The kernel's, about the descriptors; no thread or descriptor is to be had.
pub fn plug(memory: &GuestMemoryMmap, device: &NetDevice) -> io::Result<Plugged> {
    let pairs = device.queues.len();
    if pairs == 0 || pairs > MAX_PAIRS {
        return Err(io::Error::other(format!("{pairs} queues")));
    }
    let taps: io::Result<Vec<_>> = device.queues.iter().map(TapQueue::new).collect();
    let taps = taps?;
    let offered = offered_by(&taps)?;
    let shared = GuestMemoryAtomic::new(memory.clone());
    let vhost: io::Result<Vec<_>> = device
        .vhost
        .iter()
        .map(|fd| VhostNet::new(fd, &shared))
        .collect();
    let vhost = vhost?;
    if !vhost.is_empty() && vhost.len() != pairs {
        return Err(io::Error::other("one vhost-net for each queue, or none"));
    }
    let mut identity = identity(device.mac, pairs, offered);
    for vhost in &vhost {
        identity.features &= vhost.features()? | !vhost::FEATURES;
    }
    let in_kernel = !vhost.is_empty();
    let events = Arc::new(Events::new(identity.queues.len())?);
    let rings = SharedRings::new(&shared, &identity.queues, events.clone())?;
    let net = Arc::new(Net {
        taps,
        vhost: RwLock::new(vhost),
        features: AtomicU64::new(0),
        active: Mutex::new(()),
    });
    let mailbox = Arc::new(Mailbox::new()?);
    let control = Control {
        net: net.clone(),
        mailbox: mailbox.clone(),
        memory: shared.clone(),
        events: events.clone(),
    };
    let all = rings.rings();
    let queues = 2 * pairs..all.len();
    let own = all[queues.clone()].to_vec();
    let control = worker_thread("net", Kind::Network, control, own, &events, queues)?;
    let mut handles = vec![control];
    for number in 0..if in_kernel { 0 } else { pairs } {
        let pair = Pair::new(&net, number, shared.clone());
        let queues = 2 * number..2 * number + 2;
        let own = all[queues.clone()].to_vec();
        let handle = worker_thread("net-queue", Kind::Device, pair, own, &events, queues)?;
        handles.push(handle);
    }
    let rings = NetRings {
        rings,
        mailbox,
        net: net.clone(),
        pairs,
        in_kernel,
    };
    Ok(Plugged {
        planned: Planned {
            identity,
            rings: Box::new(rings),
            events,
        },
        handles,
        back_end: net,
    })
}

/// What the interface can leave to the guest. That the guest can leave something to
/// the host is a matter of the header alone.
fn offered_by(taps: &[TapQueue]) -> io::Result<u64> {
    let can_offload = taps
        .iter()
        .all(|tap| tap.set_offloads(feature::OF_GUEST).is_ok());
    for tap in taps {
        // Until a driver asks for it.
        tap.set_offloads(0)?;
    }
    Ok(match can_offload {
        true => feature::OF_GUEST | feature::OF_HOST,
        false => feature::OF_HOST,
    })
}

fn identity(mac: [u8; 6], pairs: usize, offloads: u64) -> Identity {
    use feature::{CTRL_VQ, MAC, MQ, MRG_RXBUF, STATUS};
    let mut features = FEATURES | offloads | MAC | STATUS | MRG_RXBUF;
    let mut queues = vec![QUEUE_SIZE; 2 * pairs];
    if pairs > 1 {
        features |= CTRL_VQ | MQ;
        queues.push(CONTROL_QUEUE_SIZE);
    }
    // The configuration space (5.1.4): address, "link is up", most pairs.
    let mut config = mac.to_vec();
    config.extend(1u16.to_le_bytes());
    // At most MAX_PAIRS.
    config.extend((pairs as u16).to_le_bytes());
    Identity {
        id: VIRTIO_ID_NET,
        features,
        queues,
        config: config.into(),
    }
}

#[cfg(test)]
mod tests;
