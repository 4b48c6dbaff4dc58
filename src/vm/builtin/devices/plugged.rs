//! Devices that are plugged into the running machine.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::thread::CapabilitySet;

use super::Planned;
use crate::sys::capabilities::limit_to;
use crate::vm::builtin::seccomp::{self, Kind};
use crate::vm::builtin::virtio::rings::Events;
use crate::vm::builtin::virtio::worker::{self, Service, ServiceRing};
use crate::vm::devices::vhost_user::{Error as DeviceError, Handle};

/// What a device is connected to on the host.
pub trait BackEnd: Send + Sync {
    /// Lets go of it. The device stays until its driver lets go of it, with requests
    /// failing and queues silent.
    fn disconnect(&self);
}

/// A device with the threads that serve it.
pub struct Plugged {
    pub planned: Planned,
    /// Dropping them ends the threads.
    pub handles: Vec<Handle>,
    pub back_end: Arc<dyn BackEnd>,
}

/// Starts a thread without any rights that works on some of a device's queues.
///
/// # Errors
/// No thread or descriptor is to be had.
pub fn worker_thread<S>(
    name: &'static str,
    kind: Kind,
    service: S,
    rings: Vec<ServiceRing<()>>,
    events: &Arc<Events>,
    queues: Range<usize>,
) -> io::Result<Handle>
where
    S: Service<Bitmap = ()> + Send + 'static,
{
    let events = events.clone();
    Handle::spawn(name, move |control| {
        let work = || {
            limit_to(CapabilitySet::empty())?;
            seccomp::confine(kind)?;
            let kicks = events.kicks.get(queues).unwrap_or_default();
            worker::run(&service, &rings, kicks, &service.own_events(), control)
        };
        work().map_err(DeviceError::Start)
    })
}
