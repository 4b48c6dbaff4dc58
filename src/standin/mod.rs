//! The stand-in: the host process that *is* one guest process for everybody else.
//!
//! Its pid is in the pid file. Engines reap it, signal it, and enter its
//! namespaces, so it lives in namespaces that mirror the container's and in a
//! mount namespace pivoted to the container's rootfs ([`spawn`]). It relays
//! stdio and signals ([`relay`]) and ends exactly as the guest process ended,
//! after all output is out. When it is killed, its control connection closes
//! and the agent kills the guest process.
//!
//! It gets everything it needs as descriptors from the command that made it,
//! follows no path and opens no file, has no capability and only the system calls
//! of its loop ([`seccomp`]), and is small: no runtime, no threads, no allocation
//! beyond the relay's buffers.

mod end;
mod pump;
mod relay;
mod seccomp;
pub mod spawn;
mod terminal;

use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use crate::sys::seqpacket::Channel;
use crate::sys::trim;
use end::Ending;

/// The stand-in's name on the hidden command line.
pub const COMMAND: &str = "standin";
/// Descriptor of the channel to the command that made it.
pub const CHANNEL_FD: i32 = 3;

/// How long the command that makes it may take from one message to the next;
/// in between it waits for a VM to boot.
const CREATOR_DEADLINE: Duration = Duration::from_secs(600);

/// Message bits that say which streams come with the control connection.
pub const HAS_STDIN: u8 = 1;
pub const HAS_STDOUT: u8 = 2;
pub const HAS_STDERR: u8 = 4;
pub const TERMINAL: u8 = 8;
/// Message bit: the command stays as long as the process does (`run`), and the
/// channel with it.
pub const ATTACHED: u8 = 16;

/// What a stand-in connects besides stdio, as a byte of the message that brings it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Relayed {
    /// A pipe that the process reads from.
    Input = 1,
    /// A pipe that it writes to.
    Output = 2,
    /// A stream socket.
    Socket = 3,
}

impl Relayed {
    fn from_byte(byte: u8) -> Option<Relayed> {
        [Relayed::Input, Relayed::Output, Relayed::Socket]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// What a stand-in gets of the command that made it.
struct Streams {
    flags: u8,
    /// The control connection and those that `flags` announces.
    guest: Vec<OwnedFd>,
    relayed: Vec<Pair>,
}

/// Something the stand-in connects besides stdio.
struct Pair {
    kind: Relayed,
    guest: OwnedFd,
    host: OwnedFd,
}

/// Runs a stand-in. The return value is the exit code for a process that could
/// not even start; else it ends as its guest process did.
pub fn main() -> u8 {
    // SAFETY: `spawn` has put the channel there, and nothing else in this
    // process knows of it.
    let channel = Channel::from(unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) });
    let Some(streams) = receive_streams(&channel) else {
        return 1;
    };
    let Ok(relay) = relay::Relay::new(streams) else {
        return 1;
    };
    // The message with the streams was received into a buffer for the longest there is.
    trim::heap();
    if seccomp::confine().is_err() || channel.send(b"attached", &[]).is_err() {
        return 1;
    }
    trim::code_and_constants();
    match relay.run(Some(channel)) {
        Ending::Exited(code) => code,
        Ending::Killed(signal) => end::by_signal(signal),
    }
}

/// The message is a byte of flags, and one per further thing to relay; its descriptors
/// are the streams in the order of the flags, then the two ends of each thing.
fn receive_streams(channel: &Channel) -> Option<Streams> {
    let message = channel.recv(CREATOR_DEADLINE).ok()??;
    let (&flags, kinds) = message.bytes.split_first()?;
    let streams = 1 + (flags & (HAS_STDIN | HAS_STDOUT | HAS_STDERR)).count_ones() as usize;
    if message.fds.len() != streams + 2 * kinds.len() {
        return None;
    }
    let mut fds = message.fds.into_iter();
    Some(Streams {
        flags,
        guest: fds.by_ref().take(streams).collect(),
        relayed: kinds
            .iter()
            .map(|byte| {
                Some(Pair {
                    kind: Relayed::from_byte(*byte)?,
                    guest: fds.next()?,
                    host: fds.next()?,
                })
            })
            .collect::<Option<_>>()?,
    })
}
