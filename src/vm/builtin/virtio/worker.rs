//! The thread of one device: waits for kicks of the guest and for what else the
//! device waits for, and lets it work. Idle as long as nothing happens.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vhost_user_backend::VhostUserBackend;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::vm::devices::vhost_user::{Control, Ring};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// What a device does with its queues. Its back ends for other hypervisors are
/// this as well.
pub trait Service {
    type Bitmap: vm_memory::bitmap::Bitmap + Clone + Send + Sync + 'static;

    /// Something happened: a kick of the queue with this number, or one of the
    /// device's own descriptors.
    fn handle(&self, event: u16, rings: &[ServiceRing<Self::Bitmap>]) -> io::Result<()>;

    /// Descriptors of the device to be watched, and the events they stand for.
    fn own_events(&self) -> Vec<Own> {
        Vec::new()
    }
}

/// A descriptor of a device, its event, and what makes it happen.
pub type Own = (RawFd, u64, EventSet);

pub type ServiceMemory<B> = GuestMemoryAtomic<GuestMemoryMmap<B>>;
pub type ServiceRing<B> = Ring<ServiceMemory<B>>;

impl<T> Service for Arc<T>
where
    T: VhostUserBackend,
    T::Bitmap: Clone + Send + Sync + 'static,
    Arc<T>: VhostUserBackend<Bitmap = T::Bitmap, Vring = ServiceRing<T::Bitmap>>,
{
    type Bitmap = T::Bitmap;

    fn handle(&self, event: u16, rings: &[ServiceRing<T::Bitmap>]) -> io::Result<()> {
        self.handle_event(event, EventSet::IN, rings, 0)
    }
}

const CANCEL: u64 = u64::MAX;

/// Works until the device's handle is dropped.
///
/// `kicks` are those of `rings`, `own` descriptors of the device.
///
/// # Errors
/// The descriptors cannot be watched, or the device gives up.
pub fn run<S: Service>(
    service: &S,
    rings: &[ServiceRing<S::Bitmap>],
    kicks: &[EventFd],
    own: &[Own],
    control: &Control,
) -> io::Result<()> {
    let epoll = Epoll::new()?;
    let watch = |fd: RawFd, event: u64, set: EventSet| {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, event))
    };
    for (number, kick) in kicks.iter().enumerate() {
        watch(kick.as_raw_fd(), number as u64, EventSet::IN)?;
    }
    for &(fd, event, set) in own {
        watch(fd, event, set)?;
    }
    watch(control.cancelled().as_raw_fd(), CANCEL, EventSet::IN)?;
    let mut ready = [EpollEvent::default(); 8];
    loop {
        let count = match epoll.wait(-1, &mut ready) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            count => count?,
        };
        for event in &ready[..count] {
            let number = event.data();
            if number == CANCEL {
                return Ok(());
            }
            if let Some(kick) = usize::try_from(number).ok().and_then(|n| kicks.get(n)) {
                // Fails only when it was not set.
                let _ = kick.read();
            }
            // All numbers but CANCEL are small.
            service.handle(number as u16, rings)?;
        }
    }
}
