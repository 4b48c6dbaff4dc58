//! virtio-vsock: stream sockets between processes of the guest and unix sockets
//! on the host, without /dev/vhost-vsock and without context ids to allocate.
//!
//! The device owns a directory on the host.
//!
//! - A host process that wants port P of the guest connects to `vsock.sock`
//!   there and sends `CONNECT P\n`. When the guest has accepted, it gets
//!   `OK <port>\n` (the port of its end) and from then on the connection is the
//!   stream. Bytes sent right behind the line are part of the stream. Otherwise it
//!   gets one line that begins with `ERR ` and says why, and the end of the stream.
//! - A guest process that connects to port P of the host (context id 2) reaches
//!   whoever listens on `vsock.sock_P`; if nobody does, its connection is refused.
//!
//! Both directions of a stream end on their own, as shutdown(2) does, and
//! nothing that was sent before an end is lost, also when the other direction
//! has ended or the sender has closed its socket. When the VM ends, so do all
//! streams, after what the guest had sent.
//!
//! The guest is hostile: all memory it can make the device use is bounded (see
//! the constants in [`device`]), all work it can cause is done in bounded turns,
//! and what is malformed is answered with a reset or ignored.
//!
//! - [`packet`]: headers and buffers; the only place with raw memory
//! - [`connection`]: one stream, its credit and its ends
//! - [`table`]: all streams
//! - [`host`]: listening socket, event loop, CONNECT line
//! - [`device`]: what packets and host events do to streams
//! - [`vhost_user`]: the glue towards an external VMM

pub mod connection;
pub mod device;
#[cfg(any(test, fuzzing))]
#[allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a fuzz target fails by panicking"
)]
pub(in crate::vm) mod fuzzing;
pub mod host;
pub mod packet;
pub mod table;
#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod tests;
mod vhost_user;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use rustix::thread::CapabilitySet;

use self::device::Device;
use self::vhost_user::Backend;
pub(in crate::vm) use self::vhost_user::{CONTINUE_EVENT, HOST_EVENT};
use super::vhost_user::{Control, Error, Handle, serve};
use crate::sys::capabilities::limit_to;

/// Serves the socket device of a VM to the VMM that connects to `listener`.
///
/// `dir` is the directory for the sockets; `vsock.sock` exists in it when this
/// returns. `guest_cid` is the guest's own context id, 3 or more; it need not be
/// unique on the host.
///
/// # Errors
/// The socket exists already, or no descriptor or thread is to be had.
pub fn spawn(listener: UnixListener, dir: OwnedFd, guest_cid: u64) -> io::Result<Handle> {
    let device = Device::new(guest_cid, dir)?;
    Handle::spawn("vsock", move |control| {
        let device = start(device, control)?;
        let (backend, own) = (device.backend.clone(), device.own_events());
        let served = serve("vsock-control", listener, backend, &own, control);
        device.backend.finish();
        served
    })
}

/// Serves the socket device to the built-in VMM: `work` owns the virtqueues, and
/// runs on the device's thread.
///
/// # Errors
/// As [`spawn`].
pub(in crate::vm) fn spawn_with<F>(dir: OwnedFd, guest_cid: u64, work: F) -> io::Result<Handle>
where
    F: FnOnce(&Started<'_>) -> io::Result<()> + Send + 'static,
{
    let device = Device::new(guest_cid, dir)?;
    Handle::spawn("vsock", move |control| {
        let device = start(device, control)?;
        let served = work(&device).map_err(Error::Start);
        device.backend.finish();
        served
    })
}

/// The device on its thread.
pub(in crate::vm) struct Started<'a> {
    pub backend: Arc<Backend>,
    pub control: &'a Control,
    host: RawFd,
}

impl Started<'_> {
    /// Descriptors that the thread watches besides the rings, and their events.
    pub fn own_events(&self) -> [(RawFd, u64); 2] {
        [
            (self.host, HOST_EVENT),
            (self.backend.unfinished.as_raw_fd(), CONTINUE_EVENT),
        ]
    }
}

fn start(device: Device, control: &Control) -> Result<Started<'_>, Error> {
    let host = device.poll_fd();
    // The sockets belong to this user.
    limit_to(CapabilitySet::empty()).map_err(Error::Start)?;
    Ok(Started {
        backend: Backend::new(device, control.status()).map_err(Error::Start)?,
        control,
        host,
    })
}
