//! Serving a device to an external VMM over vhost-user.
//!
//! The VMM connects once to a socket that exists before it starts. From then on
//! two threads belong to the device: one answers the VMM's control messages,
//! the other waits for kicks of the guest and for the device's own descriptors,
//! and does all the work. Both end when the VMM closes the connection.

use std::any::Any;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};

use crate::sys::seqpacket::wait_readable;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::time::{Duration, Instant};
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::bitmap::BitmapReplace;
use vhost_user_backend::{
    Error as DaemonError, VhostUserBackend, VhostUserDaemon, VringMutex, VringState,
    VringStateGuard, VringStateMutGuard, VringT,
};
use virtio_queue::Error as QueueError;
use vm_memory::mmap::NewBitmap;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why a device stopped, or could not be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot start the device: {0}")]
    Start(#[source] io::Error),
    #[error("waiting for the VMM was cancelled")]
    Cancelled,
    #[error("waiting for the VMM: {0}")]
    Accept(#[source] io::Error),
    #[error("vhost-user: {0}")]
    Protocol(String),
    #[error("the device's thread has panicked")]
    Panicked,
}

/// A device that is being served.
///
/// Dropping it gives up waiting for a VMM that has not connected yet; a device
/// that is connected lives as long as the VMM.
#[derive(Debug)]
pub struct Handle {
    cancel: Arc<EventFd>,
    status: Arc<Status>,
}

/// Whether a device works, shared by its threads and its [`Handle`].
#[derive(Debug)]
pub(in crate::vm) struct Status {
    /// Why it does not work any more.
    failure: OnceLock<String>,
    /// Its thread has nothing more to do.
    ended: AtomicBool,
    /// Readable when the device has ended or failed.
    changed: EventFd,
}

impl Status {
    /// # Errors
    /// No descriptor is to be had.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            failure: OnceLock::new(),
            ended: AtomicBool::new(false),
            changed: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        }))
    }

    fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// For who drives a device without a [`Handle`].
    #[cfg(any(test, fuzzing))]
    #[track_caller]
    pub fn assert_works(&self) {
        assert_eq!(self.failure(), None, "the device has failed");
    }

    /// The device no longer works. The first reason counts.
    fn fail(&self, reason: String) {
        self.failure.get_or_init(|| reason);
        self.announce();
    }

    fn announce(&self) {
        // Fails only when the counter is full, that is, when it is set already.
        let _ = self.changed.write(1);
    }
}

impl Handle {
    /// Runs `serve` on a thread of its own, `name` being at most 15 bytes.
    ///
    /// # Errors
    /// No thread or descriptor is to be had.
    pub(in crate::vm) fn spawn<F>(name: &str, serve: F) -> io::Result<Self>
    where
        F: FnOnce(&Control) -> Result<(), Error> + Send + 'static,
    {
        let control = Control {
            cancel: Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?),
            status: Status::new()?,
        };
        let (cancel, status) = (control.cancel.clone(), control.status.clone());
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                match catch_unwind(AssertUnwindSafe(|| serve(&control))) {
                    Ok(Ok(())) => {}
                    Ok(Err(e)) => control.status.fail(e.to_string()),
                    Err(panic) => control.status.fail(panic_text(&*panic).to_owned()),
                }
                control.status.ended.store(true, Ordering::Release);
                control.status.announce();
            })?;
        Ok(Self { cancel, status })
    }

    /// Ends the device, which no VMM is connected to any more; `false` when it has not ended
    /// in time.
    pub fn end(self, deadline: Duration) -> bool {
        let status = self.status.clone();
        drop(self);
        let end = Instant::now() + deadline;
        while !status.ended.load(Ordering::Acquire) {
            let left = end.saturating_duration_since(Instant::now());
            // SAFETY: the event descriptor is open as long as `status` lives.
            let changed = unsafe { BorrowedFd::borrow_raw(status.changed.as_raw_fd()) };
            if left.is_zero() || !wait_readable(changed, left).unwrap_or(false) {
                return false;
            }
            // Fails only when somebody else was faster.
            let _ = status.changed.read();
        }
        true
    }

    /// Why the device no longer works although the VM may still run: the VM is of
    /// no use any more. `None` while it works, and when it ended with its VMM.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.status.failure()
    }
}

impl AsFd for Handle {
    /// Readable once the device has failed, see [`Handle::failure`], or has ended
    /// because the VMM closed the connection.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the event descriptor is open as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw(self.status.changed.as_raw_fd()) }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Fails only when the counter is full, that is, when it is set already.
        let _ = self.cancel.write(1);
    }
}

/// A device's view of its [`Handle`].
pub(in crate::vm) struct Control {
    cancel: Arc<EventFd>,
    status: Arc<Status>,
}

/// Runs a step of a worker. A panic must not end the worker behind everyone's
/// back: the device is reported as failed.
pub(super) fn guarded(status: &Status, step: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(step)) {
        status.fail(panic_text(&*panic).to_owned());
    }
}

impl Control {
    /// For the worker, to report that the device no longer works.
    pub fn status(&self) -> Arc<Status> {
        self.status.clone()
    }

    /// Readable when the device is to end.
    pub fn cancelled(&self) -> &EventFd {
        &self.cancel
    }

    /// Waits for the VMM to connect.
    fn wait_for_vmm(&self, listener: &UnixListener) -> Result<(), Error> {
        // SAFETY: the event descriptor is open as long as `self` lives.
        let cancel = unsafe { BorrowedFd::borrow_raw(self.cancel.as_raw_fd()) };
        let mut fds = [
            PollFd::new(cancel, PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        loop {
            // No deadline of its own: whoever starts the VMM has one, and cancels.
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                result => result.map_err(|e| Error::Accept(e.into()))?,
            };
            if fds[0].any() == Some(true) {
                return Err(Error::Cancelled);
            }
            if fds[1].any() == Some(true) {
                return Ok(());
            }
        }
    }
}

/// Serves `backend` to the first VMM that connects to `listener`, until it
/// disconnects.
///
/// `extra` is a descriptor that the worker watches besides the rings, and the
/// event number it reports.
pub(in crate::vm) fn serve<T>(
    name: &str,
    listener: UnixListener,
    backend: T,
    extra: &[(RawFd, u64)],
    control: &Control,
) -> Result<(), Error>
where
    T: VhostUserBackend + Clone + 'static,
    T::Bitmap: BitmapReplace + NewBitmap + Clone + Send + Sync,
    T::Vring: Clone + Send + Sync,
{
    control.wait_for_vmm(&listener)?;
    let protocol = |e: DaemonError| Error::Protocol(e.to_string());
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<T::Bitmap>::new());
    let mut daemon = VhostUserDaemon::new(name.to_owned(), backend, memory).map_err(protocol)?;
    for handler in daemon.get_epoll_handlers() {
        for &(fd, event) in extra {
            handler
                .register_listener(fd, EventSet::IN, event)
                .map_err(Error::Start)?;
        }
    }
    let mut listener = Listener::from(listener);
    daemon.start(&mut listener).map_err(protocol)?;
    // One VMM, one connection.
    drop(listener);
    match daemon.wait() {
        Ok(()) => Ok(()),
        // How a VMM that exits looks, in the middle of a message or not.
        Err(DaemonError::HandleRequest(
            ProtocolError::Disconnected | ProtocolError::PartialMessage,
        )) => Ok(()),
        Err(DaemonError::WaitDaemon(_)) => Err(Error::Panicked),
        Err(e) => Err(protocol(e)),
    }
    // The worker is stopped and joined when the daemon is dropped.
}

/// Stops a device's worker.
///
/// The library asks for it when it can no longer be told that there is none, and
/// a worker without one is never joined; so it is made beforehand.
#[derive(Debug)]
pub(in crate::vm) struct ExitEvent(Mutex<Option<(EventConsumer, EventNotifier)>>);

impl ExitEvent {
    /// # Errors
    /// No descriptor is to be had.
    pub fn new() -> io::Result<Self> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        new_event_consumer_and_notifier(flags).map(|event| Self(Mutex::new(Some(event))))
    }

    /// For the one worker there is.
    pub fn take(&self) -> Option<(EventConsumer, EventNotifier)> {
        lock(&self.0).take()
    }
}

/// Locks a mutex whose data is consistent between any two calls of its users, so
/// that a panic in one of them does not matter.
pub(in crate::vm) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As [`lock`], for what is mostly read.
pub(in crate::vm) trait PoisonFree<T> {
    fn read_unpoisoned(&self) -> RwLockReadGuard<'_, T>;
    fn write_unpoisoned(&self) -> RwLockWriteGuard<'_, T>;
}

impl<T> PoisonFree<T> for RwLock<T> {
    fn read_unpoisoned(&self) -> RwLockReadGuard<'_, T> {
        self.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_unpoisoned(&self) -> RwLockWriteGuard<'_, T> {
        self.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Text of a panic.
pub(in crate::vm) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Memory of a guest whose writes by the device need not be logged: there is no
/// migration.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A virtqueue that is processed as soon as it starts, and that knows whether
/// the driver started it from scratch.
///
/// The library waits for a kick before it looks at a ring. A ring that continues
/// after a pause of the VM may never get one, and the device may have had
/// something to send all along; so setting the kick descriptor is a kick.
#[derive(Clone)]
pub struct Ring<M: vm_memory::GuestAddressSpace = Memory> {
    inner: VringMutex<M>,
    fresh: Arc<AtomicBool>,
}

impl<M: vm_memory::GuestAddressSpace> Ring<M> {
    /// Whether the ring was set to its beginning since the last call.
    pub fn take_fresh(&self) -> bool {
        self.fresh.swap(false, Ordering::AcqRel)
    }
}

impl<'a, M: vm_memory::GuestAddressSpace + 'a> VringStateGuard<'a, M> for Ring<M> {
    type G = <VringMutex<M> as VringStateGuard<'a, M>>::G;
}

impl<'a, M: vm_memory::GuestAddressSpace + 'a> VringStateMutGuard<'a, M> for Ring<M> {
    type G = <VringMutex<M> as VringStateMutGuard<'a, M>>::G;
}

impl<M: vm_memory::GuestAddressSpace + 'static> VringT<M> for Ring<M> {
    fn new(mem: M, max_queue_size: u16) -> Result<Self, QueueError> {
        Ok(Self {
            inner: VringMutex::new(mem, max_queue_size)?,
            fresh: Arc::new(AtomicBool::new(false)),
        })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, M>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, M>>::G {
        self.inner.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), QueueError> {
        self.inner.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), QueueError> {
        self.inner.set_queue_info(desc, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        if base == 0 {
            self.fresh.store(true, Ordering::Release);
        }
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.inner.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.inner.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        if let Some(mut kick) = file.as_ref() {
            // Fails only when the counter is full, that is, when it is set already.
            let _ = kick.write(&1u64.to_ne_bytes());
        }
        self.inner.set_kick(file);
    }

    fn read_kick(&self) -> io::Result<bool> {
        match self.inner.read_kick() {
            // The descriptor was replaced after the event; an error would end
            // the worker.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(self.get_ref().is_enabled()),
            result => result,
        }
    }

    fn set_call(&self, file: Option<File>) {
        self.inner.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}

/// Whether the ring may be processed now.
pub(in crate::vm) fn is_running<M: vm_memory::GuestAddressSpace>(state: &VringState<M>) -> bool {
    use virtio_queue::QueueT;
    state.is_enabled() && state.get_queue().ready()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn is_readable(handle: &Handle) -> bool {
        let mut fds = [PollFd::new(handle.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(2000u16)).unwrap() == 1
    }

    fn listener() -> (tempfile::TempDir, UnixListener) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("vmm")).unwrap();
        (dir, listener)
    }

    fn wait_for_vmm(listener: UnixListener) -> Handle {
        Handle::spawn("test", move |control| control.wait_for_vmm(&listener)).unwrap()
    }

    #[test]
    fn waiting_for_a_vmm_ends_with_the_handle() {
        let (_dir, listener) = listener();
        let handle = wait_for_vmm(listener);
        let status = handle.status.clone();
        assert!(handle.failure().is_none());
        drop(handle);
        let handle = Handle {
            cancel: Arc::new(EventFd::new(EFD_CLOEXEC).unwrap()),
            status,
        };
        assert!(is_readable(&handle));
        assert_eq!(
            handle.failure().unwrap(),
            "waiting for the VMM was cancelled"
        );
    }

    #[test]
    fn a_vmm_that_connects_and_leaves_ends_the_device() {
        let dir = tempfile::tempdir().unwrap();
        let sockets = std::fs::File::open(dir.path()).unwrap().into();
        let path = dir.path().join("vmm");
        let listener = UnixListener::bind(&path).unwrap();
        let handle = crate::vm::devices::vsock::spawn(listener, sockets, 3).unwrap();
        assert!(dir.path().join("vsock.sock").exists());
        drop(std::os::unix::net::UnixStream::connect(&path).unwrap());
        assert!(is_readable(&handle));
        assert_eq!(handle.failure(), None);
        assert!(!dir.path().join("vsock.sock").exists());
    }

    #[test]
    fn a_panic_of_either_thread_is_reported_with_its_reason() {
        let worker = Handle::spawn("test", |control| {
            let status = control.status();
            guarded(&status, || panic!("worker, on purpose"));
            guarded(&status, || panic!("later ones do not matter"));
            std::thread::sleep(Duration::from_millis(10));
            Ok(())
        })
        .unwrap();
        assert!(is_readable(&worker));
        assert_eq!(worker.failure(), Some("worker, on purpose"));
        let control = Handle::spawn("test", |_| panic!("control, on purpose")).unwrap();
        assert!(is_readable(&control));
        assert_eq!(control.failure(), Some("control, on purpose"));
    }
}
