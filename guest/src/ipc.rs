//! Messages with descriptors between the agent, the zygote and the helpers.
//!
//! A message is one datagram on a `SOCK_SEQPACKET` pair: a few bytes and at most
//! [`MAX_FDS`] descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use kuasar_runv_protocol::namespace::Kind;
use kuasar_runv_protocol::stream::MAX_PRESERVED;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};

/// Longest body, in bytes. Specs do not travel here, they are files.
pub const MAX_BODY: usize = 16 * 1024;
/// The answer socket, three streams, what an exec needs besides or the namespaces
/// that a container joins, and preserved descriptors.
pub const MAX_FDS: usize = 4 + Kind::ALL.len() + MAX_PRESERVED as usize;

/// A connected pair, close-on-exec and blocking.
///
/// # Errors
/// `EMFILE`, `ENFILE`.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

/// Sends one message.
///
/// # Errors
/// `EPIPE` when the peer is gone, `EAGAIN` on a full non-blocking socket,
/// `InvalidInput` for a body that is too long.
pub fn send(socket: &impl AsFd, body: &[u8], fds: &[RawFd]) -> io::Result<()> {
    if body.len() > MAX_BODY || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "message is too long",
        ));
    }
    let rights = [ControlMessage::ScmRights(fds)];
    sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &[IoSlice::new(body)],
        if fds.is_empty() { &[] } else { &rights },
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives one message; `None` when the peer is gone.
///
/// # Errors
/// `EAGAIN` on an empty non-blocking socket.
pub fn receive(socket: &impl AsFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut body = vec![0; MAX_BODY];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let (len, fds) = {
        let mut iov = [IoSliceMut::new(&mut body)];
        let message = loop {
            match recvmsg::<()>(
                socket.as_fd().as_raw_fd(),
                &mut iov,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Err(nix::Error::EINTR) => {}
                // nix's result borrows the buffers, so it cannot leave the loop
                // in any other way.
                result => break result?,
            }
        };
        let mut fds = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel installed these descriptors for us.
                fds.extend(
                    raw.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        (message.bytes, fds)
    };
    if len == 0 {
        return Ok(None);
    }
    body.truncate(len);
    Ok(Some((body, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_message_carries_its_descriptors() {
        let (a, b) = pair().unwrap();
        let (r, w) = crate::sys::pipe().unwrap();
        send(&a, b"hello", &[w.as_raw_fd()]).unwrap();
        drop(w);
        let (text, fds) = receive(&b).unwrap().unwrap();
        assert_eq!(text, b"hello");
        let mut fds = fds.into_iter();
        std::fs::File::from(fds.next().unwrap())
            .write_all(b"x")
            .unwrap();
        assert!(fds.next().is_none());
        let mut got = String::new();
        std::fs::File::from(r).read_to_string(&mut got).unwrap();
        assert_eq!(got, "x");
    }

    #[test]
    fn the_end_of_the_peer_is_not_an_error() {
        let (a, b) = pair().unwrap();
        drop(a);
        assert!(receive(&b).unwrap().is_none());
    }
}
