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
pub mod relay;
mod seccomp;
pub mod spawn;
mod terminal;
mod trim;

use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use crate::sys::seqpacket::Channel;
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

/// Runs a stand-in. The return value is the exit code for a process that could
/// not even start; else it ends as its guest process did.
pub fn main() -> u8 {
    // SAFETY: `spawn` has put the channel there, and nothing else in this
    // process knows of it.
    let channel = Channel::from(unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) });
    let Some((flags, streams)) = receive_streams(&channel) else {
        return 1;
    };
    let Ok(relay) = relay::Relay::new(flags, streams) else {
        return 1;
    };
    if seccomp::confine().is_err() || channel.send(b"attached", &[]).is_err() {
        return 1;
    }
    trim::code_and_constants();
    match relay.run(Some(channel)) {
        Ending::Exited(code) => code,
        Ending::Killed(signal) => end::by_signal(signal),
    }
}

fn receive_streams(channel: &Channel) -> Option<(u8, Vec<OwnedFd>)> {
    let message = channel.recv(CREATOR_DEADLINE).ok()??;
    let flags = *message.bytes.first()?;
    let expected = 1 + (flags & (HAS_STDIN | HAS_STDOUT | HAS_STDERR)).count_ones();
    (message.fds.len() == expected as usize).then_some((flags, message.fds))
}
