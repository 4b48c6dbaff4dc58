//! The kernel's announcements of devices (`NETLINK_KOBJECT_UEVENT`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use super::{Error, Result};
use crate::hotplug;

/// How long an attached device may take to appear.
const APPEARS: Duration = Duration::from_secs(20);

/// The group of the kernel's own messages; udev's have another.
const KERNEL: u32 = 1;

/// Has the kernel look for devices until `find` finds what was attached as `name`.
///
/// # Errors
/// It does not appear; those of `find`.
pub fn appears<T>(name: &str, mut find: impl FnMut() -> io::Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + APPEARS;
    let uevents = Uevents::new().map_err(Error::io("listening for devices"))?;
    hotplug::rescan().map_err(Error::io("looking for devices"))?;
    loop {
        let found = find().map_err(Error::io(format!("looking for {name}")))?;
        if let Some(found) = found {
            return Ok(found);
        }
        let heard = uevents.wait(deadline);
        if !heard.map_err(Error::io("listening for devices"))? {
            return Err(Error::Deadline(format!(
                "the disk {name} did not appear within {APPEARS:?}"
            )));
        }
    }
}

/// Hears of every device that comes or goes after it was made.
pub struct Uevents(OwnedFd);

impl Uevents {
    /// # Errors
    /// As socket(2).
    pub fn new() -> io::Result<Uevents> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, KERNEL))?;
        Ok(Uevents(fd))
    }

    /// Waits until there was an announcement; `false` at the deadline.
    ///
    /// # Errors
    /// As poll(2).
    pub fn wait(&self, deadline: Instant) -> io::Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        // What they say is looked up anew; an overflow says that there were many.
        let mut message = [0; 4096];
        while !matches!(
            recv(self.0.as_raw_fd(), &mut message, MsgFlags::empty()),
            Err(nix::Error::EAGAIN)
        ) {}
        Ok(true)
    }
}
