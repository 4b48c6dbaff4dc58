//! Messages with descriptors between the agent, the zygote and the helpers.
//!
//! A message is one datagram on a `SOCK_SEQPACKET` pair: a small JSON body and
//! at most [`MAX_FDS`] descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest body, in bytes. Specs do not travel here, they are files.
const MAX_BODY: usize = 16 * 1024;
/// The answer socket and three streams.
pub const MAX_FDS: usize = 4;

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
pub fn send<T: Serialize>(socket: &impl AsFd, body: &T, fds: &[RawFd]) -> io::Result<()> {
    let body = serde_json::to_vec(body)?;
    if body.len() > MAX_BODY || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "message is too long",
        ));
    }
    let rights = [ControlMessage::ScmRights(fds)];
    sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &[IoSlice::new(&body)],
        if fds.is_empty() { &[] } else { &rights },
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives one message; `None` when the peer is gone.
///
/// # Errors
/// `EAGAIN` on an empty non-blocking socket, `InvalidData` for what is not a
/// message.
pub fn receive<T: DeserializeOwned>(socket: &impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
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
    Ok(Some((serde_json::from_slice(&body[..len])?, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_message_carries_its_descriptors() {
        let (a, b) = pair().unwrap();
        let (r, w) = crate::sys::pipe().unwrap();
        send(&a, &"hello", &[w.as_raw_fd()]).unwrap();
        drop(w);
        let (text, fds): (String, _) = receive(&b).unwrap().unwrap();
        assert_eq!(text, "hello");
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
        assert!(receive::<String>(&b).unwrap().is_none());
    }

    #[test]
    fn what_is_not_a_message_is_refused() {
        let (a, b) = pair().unwrap();
        send(&a, &7, &[]).unwrap();
        assert_eq!(
            receive::<String>(&b).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }
}
