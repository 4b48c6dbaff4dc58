//! Message sockets between processes of the runtime: one datagram is one
//! message, with file descriptors attached where it needs them.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use kuasar_runv_protocol::stream::MAX_PRESERVED;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};

/// Longest message, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors that come with one message: a stand-in's control connection and
/// standard streams, and both ends of what it relays besides.
pub const MAX_FDS: usize = 4 + 2 * MAX_PRESERVED as usize;

/// One end of a connection.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A received message.
#[derive(Debug, Default)]
pub struct Message {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Channel(fd)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

impl Channel {
    /// Two connected ends, both closed on exec.
    ///
    /// # Errors
    /// As socketpair(2).
    pub fn pair() -> io::Result<(Channel, Channel)> {
        let (a, b) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Channel(a), Channel(b)))
    }

    /// Sends one message.
    ///
    /// # Errors
    /// As sendmsg(2); `BrokenPipe` when the other end is gone.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        sendmsg(
            &self.0,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Sends one message if that needs no waiting; `false` when it would.
    ///
    /// # Errors
    /// As sendmsg(2); `BrokenPipe` when the other end is gone.
    pub fn try_send(&self, bytes: &[u8]) -> io::Result<bool> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match rustix::net::send(&self.0, bytes, flags) {
            Ok(_) => Ok(true),
            Err(rustix::io::Errno::AGAIN) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Receives one message; `None` when the other end is closed.
    ///
    /// # Errors
    /// `TimedOut` after `deadline`, `InvalidData` for a message that is too
    /// long, else as recvmsg(2).
    pub fn recv(&self, deadline: Duration) -> io::Result<Option<Message>> {
        if !wait_readable(self.as_fd(), deadline)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "message longer than the protocol allows",
            ));
        }
        if received.bytes == 0 && fds.is_empty() {
            return Ok(None);
        }
        bytes.truncate(received.bytes);
        Ok(Some(Message { bytes, fds }))
    }
}

/// Waits until `fd` is readable (or hung up); `false` after `deadline`.
///
/// # Errors
/// As poll(2).
pub fn wait_readable(fd: BorrowedFd<'_>, deadline: Duration) -> io::Result<bool> {
    Ok(wait_any_readable(&[fd], deadline)?[0])
}

/// Waits until one of `fds` is readable (or hung up) and says which are; none
/// after `deadline`.
///
/// # Errors
/// As poll(2).
pub fn wait_any_readable(fds: &[BorrowedFd<'_>], deadline: Duration) -> io::Result<Vec<bool>> {
    let end = Instant::now() + deadline;
    let mut polled: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) if !left.is_zero() => {}
            Ok(_) => return Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn a_message_arrives_whole_with_its_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let (read, write) = std::io::pipe().unwrap();
        a.send(b"hello", &[write.as_fd()]).unwrap();
        a.send(b"again", &[]).unwrap();
        let first = b.recv(SOON).unwrap().unwrap();
        assert_eq!(
            (first.bytes.as_slice(), first.fds.len()),
            (&b"hello"[..], 1)
        );
        drop((write, first));
        let mut rest = Vec::new();
        { read }.read_to_end(&mut rest).unwrap();
        assert_eq!(b.recv(SOON).unwrap().unwrap().bytes, b"again");
    }

    #[test]
    fn a_closed_end_and_a_silent_one_are_told_apart() {
        let (a, b) = Channel::pair().unwrap();
        let silent = b.recv(Duration::from_millis(10)).unwrap_err();
        assert_eq!(silent.kind(), io::ErrorKind::TimedOut);
        drop(a);
        assert!(b.recv(SOON).unwrap().is_none());
    }

    #[test]
    fn a_message_beyond_the_bound_is_refused() {
        let (a, b) = Channel::pair().unwrap();
        a.send(&vec![1; MAX_MESSAGE + 1], &[]).unwrap();
        assert_eq!(b.recv(SOON).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
