//! Between a program that serves a network card and QEMU, which makes cards only of
//! connections that it has made itself, to a path: a descriptor that is passed to it may not be
//! one for descriptors, it says ("does not support FD passing"). And a connection of its own
//! would be made with its rights, which are less than those of who named the socket, and after
//! the program was asked what it is, which some take for the end of the machine.
//!
//! So QEMU connects to a socket in the sandbox directory, and a thread passes messages on, each
//! with its descriptors, until one side ends the connection. They are few: frames go through
//! memory that both have.
//!
//! QEMU switches a card's queues on before it says which features it has accepted. A program is
//! right to take that for an error, because it is the feature `PROTOCOL_FEATURES` that makes the
//! request one of the protocol, and those made of rust-vmm's crates do. So such requests wait
//! here until the features have gone by ([`Order`]).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::thread::CapabilitySet;

use crate::sys::capabilities::limit_to;
use crate::sys::seqpacket::wait_readable;
use crate::sys::unix_socket::{self, read_until};

/// Number of the request, flags, length of what follows (QEMU's docs/interop/vhost-user.rst,
/// "Message structure").
const HEADER: usize = 12;
const FLAGS_AT: usize = 4;
const LENGTH_AT: usize = 8;
/// Flags: version, what is an answer, and that one is awaited.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Requests that have to do with the order ("Front-end message types").
const SET_FEATURES: u32 = 2;
const RESET_OWNER: u32 = 4;
const SET_VRING_ENABLE: u32 = 18;
const RESET_DEVICE: u32 = 34;
/// Most queues that are switched before the features are set; a card here has two.
const MAX_HELD: usize = 16;
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
    let order = Some(Order::default());
    Ok([
        direction(there.0, there.1, order)?,
        direction(other, one, None)?,
    ])
}

fn direction(
    from: UnixStream,
    to: UnixStream,
    mut order: Option<Order>,
) -> io::Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name("vhost-relay".into());
    thread.stack_size(128 << 10).spawn(move || {
        let pass_all = |()| {
            while let Some(message) = receive(&from)? {
                match &mut order {
                    Some(order) => order.pass(message, &from, &to)?,
                    None => message.send(&to)?,
                }
            }
            Ok(())
        };
        let passed = limit_to(CapabilitySet::empty()).and_then(pass_all);
        if let Err(e) = passed {
            log::debug!("vhost-user relay: {e}");
        }
        for stream in [from, to] {
            // Fails only when the other direction was faster.
            let _ = stream.shutdown(Shutdown::Both);
        }
    })
}

/// A message with its descriptors; the bytes are at least a header.
struct Message {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    fn word(&self, at: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_le_bytes(word)
    }

    fn send(&self, to: &UnixStream) -> io::Result<()> {
        send(to, &self.bytes, &self.fds)
    }
}

/// The order of QEMU's requests: queues are switched when features have been set.
#[derive(Default)]
struct Order {
    features_are_set: bool,
    /// The last request for each queue that is held back.
    held: Vec<Message>,
}

impl Order {
    fn pass(&mut self, mut message: Message, qemu: &UnixStream, to: &UnixStream) -> io::Result<()> {
        let request = message.word(0);
        let is_early = request == SET_VRING_ENABLE
            && !self.features_are_set
            // Number and state of a queue.
            && message.bytes.len() == HEADER + 8;
        if !is_early {
            message.send(to)?;
            // Both take features back.
            self.features_are_set &= !matches!(request, RESET_OWNER | RESET_DEVICE);
            if request == SET_FEATURES {
                self.features_are_set = true;
                return self.held.drain(..).try_for_each(|held| held.send(to));
            }
            return Ok(());
        }
        let flags = message.word(FLAGS_AT);
        if flags & NEED_REPLY != 0 {
            // QEMU goes on only with an answer, and the program gives one when it is asked for.
            message.bytes[FLAGS_AT..LENGTH_AT]
                .copy_from_slice(&(flags & !NEED_REPLY).to_le_bytes());
            let header = [SET_VRING_ENABLE, VERSION | REPLY, 8].map(u32::to_le_bytes);
            send(qemu, &[header.concat(), vec![0; 8]].concat(), &[])?;
        }
        let queue = message.word(HEADER);
        self.held.retain(|held| held.word(HEADER) != queue);
        if self.held.len() >= MAX_HELD {
            let reason = "too many queues are switched before features are set";
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        self.held.push(message);
        Ok(())
    }
}

/// The next message; `None` at the end.
fn receive(from: &UnixStream) -> io::Result<Option<Message>> {
    let mut message = vec![0; HEADER];
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
        return Ok(None);
    }
    let too_long = || io::Error::new(io::ErrorKind::InvalidData, "a message is too long");
    if received.flags.contains(rustix::net::ReturnFlags::CTRUNC) {
        return Err(too_long());
    }
    let end = Instant::now() + DEADLINE;
    read_until(from, &mut message[received.bytes..], end)?;
    let mut length = [0; 4];
    length.copy_from_slice(&message[LENGTH_AT..HEADER]);
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(|_| too_long())?;
    if length > MAX_PAYLOAD {
        return Err(too_long());
    }
    message.resize(HEADER + length, 0);
    read_until(from, &mut message[HEADER..], end)?;
    Ok(Some(Message {
        bytes: message,
        fds,
    }))
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
    use std::io::{Read, Write};

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
        receive(&program).unwrap().unwrap().send(&to).unwrap();
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

    fn request(request: u32, flags: u32, payload: &[u32]) -> Vec<u8> {
        let header = [request, VERSION | flags, 4 * payload.len() as u32];
        header
            .iter()
            .chain(payload)
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    #[test]
    fn queues_are_switched_when_features_are_set() {
        const SET_OWNER: u32 = 3;
        let (mut qemu, one) = UnixStream::pair().unwrap();
        let (program, other) = UnixStream::pair().unwrap();
        let threads = between(one, other).unwrap();
        let enable = |queue, state| request(SET_VRING_ENABLE, 0, &[queue, state]);
        let features = request(SET_FEATURES, 0, &[1 << 30, 1]);
        let expect = |messages: &[&[u8]]| {
            for message in messages {
                let got = receive(&program).unwrap().unwrap();
                assert_eq!(&got.bytes, message);
            }
        };

        qemu.write_all(&enable(0, 1)).unwrap();
        qemu.write_all(&enable(1, 1)).unwrap();
        let owner = request(SET_OWNER, 0, &[]);
        qemu.write_all(&owner).unwrap();
        // The last word for a queue counts, and who awaits an answer gets one.
        qemu.write_all(&request(SET_VRING_ENABLE, NEED_REPLY, &[0, 0]))
            .unwrap();
        let answer = receive(&qemu).unwrap().unwrap();
        assert_eq!(answer.bytes, request(SET_VRING_ENABLE, REPLY, &[0, 0]));
        qemu.write_all(&features).unwrap();
        expect(&[&owner, &features, &enable(1, 1), &enable(0, 0)]);

        // From then on it is the program that answers.
        let asked = request(SET_VRING_ENABLE, NEED_REPLY, &[0, 1]);
        qemu.write_all(&asked).unwrap();
        expect(&[&asked]);
        // Until features are nobody's again.
        for reset in [RESET_OWNER, RESET_DEVICE] {
            let reset = request(reset, 0, &[]);
            qemu.write_all(&reset).unwrap();
            qemu.write_all(&enable(1, 0)).unwrap();
            qemu.write_all(&features).unwrap();
            expect(&[&reset, &features, &enable(1, 0)]);
        }

        drop(qemu);
        assert!(receive(&program).unwrap().is_none());
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn what_is_held_back_is_bounded() {
        let (mut qemu, one) = UnixStream::pair().unwrap();
        let (mut program, other) = UnixStream::pair().unwrap();
        let threads = between(one, other).unwrap();
        for queue in 0..=MAX_HELD as u32 {
            qemu.write_all(&request(SET_VRING_ENABLE, 0, &[queue, 1]))
                .unwrap();
        }
        assert_eq!(program.read(&mut [0]).unwrap(), 0);
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
