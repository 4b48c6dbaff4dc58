//! Devices whose back end is another program on the host, which speaks vhost-user
//! (docs/interop/vhost-user of QEMU): a storage daemon, a file server, a switch.
//!
//! The program works on the queues in the guest's memory, of which it gets the file;
//! kicks and interrupts go between it and KVM. Here are the registers, and a thread
//! ([`link`]) that negotiates, tells the program when the driver starts and stops
//! its queues, and notices when it ends. No byte of the guest's goes through it.
//!
//! The program is the user's choice and may do to the guest what it wants. It may be
//! late or gone at any time: nothing here waits for it longer than a deadline, and a
//! device without its program says that it needs a reset, while the machine goes on.

#[cfg(any(test, fuzzing))]
#[allow(clippy::expect_used, reason = "a fuzz target fails by panicking")]
pub mod fuzzing;
mod kinds;
mod link;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustix::thread::CapabilitySet;
use vm_memory::GuestMemoryMmap;

use self::kinds::Kind;
use self::link::{Link, LinkService};
use super::Planned;
use super::mailbox::{Mailbox, Request};
use super::plugged::{BackEnd, Plugged};
use crate::sys::capabilities::limit_to;
use crate::vm::VhostUserDevice;
use crate::vm::builtin::seccomp::{self, Kind as Filter};
use crate::vm::builtin::virtio::config::Config;
use crate::vm::builtin::virtio::registers::{Identity, QueueSetup, Rings};
use crate::vm::builtin::virtio::rings::Events;
use crate::vm::builtin::virtio::worker::{self, Service};
use crate::vm::devices::vhost_user::{Control, Error as DeviceError, Handle};

/// The connection, to be cut.
struct Connection(UnixStream);

impl BackEnd for Connection {
    fn disconnect(&self) {
        // Fails only when it is cut already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// The queues, as the driver starts and stops them.
struct Remote {
    mailbox: Arc<Mailbox>,
    config: Config,
}

impl Rings for Remote {
    fn start(&mut self, features: u64, queues: &[QueueSetup]) -> bool {
        !self.config.has_failed() && self.mailbox.ask(Request::Start(features, queues.to_vec()))
    }

    fn stop(&mut self) {
        if !self.config.has_failed() && !self.mailbox.ask(Request::Stop) {
            log::warn!("a vhost-user back end has not stopped");
            // It may still be in the guest's memory: no driver uses it again.
            self.config.fail();
        }
    }
}

/// What the device's thread has found out.
type Negotiated = io::Result<Identity>;

/// Makes a device of a program that has accepted a connection. `id` is for messages.
///
/// # Errors
/// The program does not answer in time, or is not what it should be; no thread or
/// descriptor is to be had.
pub fn plug(
    memory: &GuestMemoryMmap,
    vcpus: u32,
    id: &str,
    device: &VhostUserDevice,
    deadline: Duration,
) -> io::Result<Plugged> {
    let stream = UnixStream::from(device.socket.try_clone()?);
    // Otherwise the library asks for an answer over and over.
    stream.set_nonblocking(false)?;
    let connection = Arc::new(Connection(stream.try_clone()?));
    let kind = Kind::new(&device.kind, vcpus);
    let mailbox = Arc::new(Mailbox::new()?);
    // There may turn out to be fewer queues.
    let events = Arc::new(Events::new(kind.queues.len())?);
    let (sender, negotiated) = sync_channel(1);
    let thread = Thread {
        stream,
        memory: memory.clone(),
        kind,
        events: events.clone(),
        mailbox: mailbox.clone(),
        id: id.to_owned(),
    };
    let handle = Handle::spawn("vhost-user", move |control| {
        thread.work(&sender, control).map_err(DeviceError::Start)
    })?;
    let identity = match negotiated.recv_timeout(deadline) {
        Ok(negotiated) => negotiated?,
        Err(e) => {
            // Wakes the thread, which ends.
            connection.disconnect();
            return Err(match e {
                RecvTimeoutError::Timeout => io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!(
                        "the back end has not answered within {} s",
                        deadline.as_secs()
                    ),
                ),
                RecvTimeoutError::Disconnected => io::Error::other("the device's thread has ended"),
            });
        }
    };
    let rings = Remote {
        mailbox,
        config: identity.config.clone(),
    };
    Ok(Plugged {
        planned: Planned {
            identity,
            rings: Box::new(rings),
            events,
        },
        handles: vec![handle],
        back_end: connection,
    })
}

/// What the device's thread works with.
struct Thread {
    stream: UnixStream,
    memory: GuestMemoryMmap,
    kind: Kind,
    events: Arc<Events>,
    mailbox: Arc<Mailbox>,
    id: String,
}

impl Thread {
    fn work(self, sender: &mpsc::SyncSender<Negotiated>, control: &Control) -> io::Result<()> {
        limit_to(CapabilitySet::empty())?;
        seccomp::confine(Filter::VhostUser)?;
        let service = match self.negotiate() {
            Ok(service) => service,
            Err(e) => {
                // Whoever waits for it may have given up.
                let _ = sender.send(Err(e));
                return Ok(());
            }
        };
        if sender.send(Ok(service.identity.clone())).is_err() {
            return Ok(());
        }
        worker::run(&service, &[], &[], &service.own_events(), control)
    }

    fn negotiate(self) -> io::Result<LinkService> {
        let (link, identity) = Link::negotiate(self.stream, self.memory, &self.kind)?;
        Ok(LinkService::new(
            link,
            identity,
            self.kind.when_lost(),
            self.events,
            self.mailbox,
            self.id,
        ))
    }
}

#[cfg(test)]
mod tests;
