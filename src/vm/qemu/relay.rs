//! Between a program that serves a network card and QEMU, which makes cards only of
//! connections that it has made itself, to a path: a descriptor that is passed to it may not be
//! one for descriptors, it says ("does not support FD passing"). And a connection of its own
//! would be made with its rights, which are less than those of who named the socket, and after
//! the program was asked what it is, which some take for the end of the machine.
//!
//! So QEMU connects to a socket in the sandbox directory, and a thread passes messages on, each
//! with its descriptors, until one side ends the connection. They are few: frames go through
//! memory that both have.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::thread::CapabilitySet;

use crate::sys::capabilities::limit_to;
use crate::sys::seqpacket::wait_readable;
use crate::sys::unix_socket;

/// Number of the request, flags, length of what follows (QEMU's docs/interop/vhost-user.rst,
/// "Message structure").
const HEADER: usize = 12;
const LENGTH_AT: usize = 8;
/// Longest message; the longest of the protocol are tables of some tens of entries.
const MAX_PAYLOAD: usize = 16 << 10;
/// Most descriptors of a message: one for each region of memory.
const MAX_FDS: usize = 32;
/// How long the rest of a message may take, and a reader that reads nothing.
const DEADLINE: Duration = Duration::from_secs(10);

/// A socket that QEMU is about to connect to. Its name goes with the value.
pub(super) struct Relay {
    listener: UnixListener,
    path: PathBuf,
    program: UnixStream,
}

impl Relay {
    /// Listens at `name` in the directory.
    ///
    /// # Errors
    /// The name exists, or no descriptor is to be had.
    pub(super) fn new(directory: &Path, name: &str, program: &OwnedFd) -> io::Result<Relay> {
        let program = UnixStream::from(program.try_clone()?);
        program.set_nonblocking(false)?;
        let listener = unix_socket::bind(unix_socket::open_dir(directory)?, name)?;
        let path = directory.join(name);
        Ok(Relay {
            listener,
            path,
            program,
        })
    }

    /// Takes QEMU's connection, which it has made by now, and passes on what is said.
    ///
    /// # Errors
    /// It has not, or no thread is to be had.
    pub(super) fn run(self) -> io::Result<()> {
        if !wait_readable(self.listener.as_fd(), DEADLINE)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let (qemu, _) = self.listener.accept()?;
        between(qemu, self.program.try_clone()?).map(drop)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The directory goes when the sandbox does.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A thread for each direction, both of which end when either side ends the connection.
fn between(one: UnixStream, other: UnixStream) -> io::Result<[JoinHandle<()>; 2]> {
    for stream in [&one, &other] {
        stream.set_write_timeout(Some(DEADLINE))?;
    }
    let there = (one.try_clone()?, other.try_clone()?);
    Ok([direction(there.0, there.1)?, direction(other, one)?])
}

fn direction(from: UnixStream, to: UnixStream) -> io::Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name("vhost-relay".into());
    thread.stack_size(128 << 10).spawn(move || {
        let passed = limit_to(CapabilitySet::empty()).and_then(|()| pass_all(&from, &to));
        if let Err(e) = passed {
            log::debug!("vhost-user relay: {e}");
        }
        for stream in [from, to] {
            // Fails only when the other direction was faster.
            let _ = stream.shutdown(Shutdown::Both);
        }
    })
}

fn pass_all(from: &UnixStream, to: &UnixStream) -> io::Result<()> {
    while pass(from, to)? {}
    Ok(())
}

/// Passes one message on; `false` at the end.
fn pass(mut from: &UnixStream, to: &UnixStream) -> io::Result<bool> {
    let mut message = vec![0; HEADER];
    from.set_read_timeout(None)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    // The kernel gives descriptors with the byte they were sent with, the first of a message.
    let received = loop {
        let parts = &mut [IoSliceMut::new(&mut message)];
        match recvmsg(from, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    let mut fds: Vec<OwnedFd> = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = part {
            fds.extend(some);
        }
    }
    if received.bytes == 0 {
        return Ok(false);
    }
    let too_long = || io::Error::new(io::ErrorKind::InvalidData, "a message is too long");
    if received.flags.contains(rustix::net::ReturnFlags::CTRUNC) {
        return Err(too_long());
    }
    from.set_read_timeout(Some(DEADLINE))?;
    from.read_exact(&mut message[received.bytes..])?;
    let mut length = [0; 4];
    length.copy_from_slice(&message[LENGTH_AT..HEADER]);
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(|_| too_long())?;
    if length > MAX_PAYLOAD {
        return Err(too_long());
    }
    message.resize(HEADER + length, 0);
    from.read_exact(&mut message[HEADER..])?;
    send(to, &message, &fds)?;
    Ok(true)
}

fn send(to: &UnixStream, message: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let parts = [IoSlice::new(message)];
    let sent = sendmsg(to, &parts, &mut ancillary, SendFlags::NOSIGNAL)?;
    io::Write::write_all(&mut { to }, &message[sent..])
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn message(payload: &[u8]) -> Vec<u8> {
        let length = payload.len() as u32;
        let header = [5, 1, length].map(u32::to_le_bytes).concat();
        [&header, payload].concat()
    }

    #[test]
    fn messages_arrive_with_their_descriptors_until_one_side_ends() {
        let (qemu, one) = UnixStream::pair().unwrap();
        let (mut program, other) = UnixStream::pair().unwrap();
        let threads = between(one, other).unwrap();
        // Two at once: what is sent with the second belongs to that.
        let (mut reads, writes) = std::io::pipe().unwrap();
        let plain = message(b"");
        send(&qemu, &plain, &[]).unwrap();
        send(&qemu, &message(b"payload"), &[writes.into()]).unwrap();
        let mut got = vec![0; plain.len()];
        program.read_exact(&mut got).unwrap();
        assert_eq!(got, plain);
        let (to, from) = UnixStream::pair().unwrap();
        assert!(pass(&program, &to).unwrap());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 64];
        let parts = &mut [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(&from, parts, &mut ancillary, RecvFlags::empty()).unwrap();
        assert_eq!(bytes[..received.bytes], message(b"payload"));
        let mut fds = ancillary.drain().flat_map(|part| match part {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        std::fs::File::from(fds.next().unwrap())
            .write_all(b"x")
            .unwrap();
        let mut byte = [0];
        reads.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        // The answer, and the end.
        program.write_all(&message(b"answer")).unwrap();
        let mut answer = vec![0; HEADER + 6];
        (&qemu).read_exact(&mut answer).unwrap();
        assert_eq!(answer, message(b"answer"));
        drop(program);
        assert_eq!((&qemu).read(&mut [0]).unwrap(), 0);
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn a_message_that_is_too_long_ends_the_connection() {
        let (qemu, one) = UnixStream::pair().unwrap();
        let (mut program, other) = UnixStream::pair().unwrap();
        let threads = between(one, other).unwrap();
        let header = [5u32, 1, 1 << 20].map(u32::to_le_bytes).concat();
        (&qemu).write_all(&header).unwrap();
        assert_eq!(program.read(&mut [0]).unwrap(), 0);
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
