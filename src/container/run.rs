//! `run`: create and start in one go, and stay as long as the process does.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use super::create::{Options, create, trace};
use super::start::start_in_guest;
use super::state::Phase;
use super::{Error, context, delete};
use crate::root::Root;
use crate::sys::process::ProcessRef;
use crate::sys::seqpacket::wait_any_readable;

/// How `run` ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Detached,
    /// The process's exit code, or 128 and the number of the signal.
    Ended(u8),
}

/// Creates and starts a container; in the foreground it also waits for its end
/// and deletes it, unless `keep` is set.
///
/// # Errors
/// See [`Error`]; nothing is left behind.
pub fn run(root: &Root, options: &Options, keep: bool) -> Result<Outcome, Error> {
    if !options.foreground {
        let mut created = create(root, options)?;
        start_in_guest(&created.agent, &options.id)?;
        created.record_phase(Phase::Started)?;
        created.keep()?;
        return Ok(Outcome::Detached);
    }
    // Before there is any other thread: it would take the signals otherwise.
    let signals = all_signals()?;
    let mut created = create(root, options)?;
    let terminal = created.terminal.then(RawTerminal::enter).flatten();
    start_in_guest(&created.agent, &options.id)?;
    trace("started");
    created.record_phase(Phase::Started)?;
    let standin = created.standin();
    created.keep()?;
    let code = wait(standin, &signals)?;
    trace("exited");
    drop(terminal);
    if !keep {
        delete::delete(root, &options.id, true)?;
    }
    trace("run-end");
    Ok(Outcome::Ended(code))
}

/// Blocks every signal and makes them readable.
pub(super) fn all_signals() -> Result<SignalFd, Error> {
    let set = SigSet::all();
    set.thread_block()
        .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK))
        .map_err(|e| context("signalfd")(e.into()))
}

/// Passes signals on to the stand-in until it ends; the code a shell would report.
pub(super) fn wait(standin: ProcessRef, signals: &SignalFd) -> Result<u8, Error> {
    let failed = |e: nix::Error| context("waiting for the container")(io::Error::from(e));
    let pid = Pid::from_raw(standin.pid);
    let pidfd = standin.pidfd().map_err(context("watching the stand-in"))?;
    let mut watched = vec![signals.as_fd()];
    watched.extend(pidfd.as_ref().map(AsFd::as_fd));
    loop {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)).map_err(failed)? {
            WaitStatus::Exited(_, code) => return Ok(code.to_le_bytes()[0]),
            WaitStatus::Signaled(_, signal, _) => {
                return Ok(u8::try_from(128 + signal as i32).unwrap_or(u8::MAX));
            }
            _ => {}
        }
        wait_any_readable(&watched, Duration::from_secs(3600))
            .map_err(context("waiting for the container"))?;
        while let Some(info) = signals.read_signal().map_err(failed)? {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            match Signal::try_from(number) {
                Ok(Signal::SIGCHLD | Signal::SIGPIPE | Signal::SIGURG) => {}
                // It may just have ended.
                Ok(signal) => drop(kill(pid, signal)),
                Err(_) => {}
            }
        }
    }
}

/// The caller's terminal while the guest's does the line discipline. Restored
/// when dropped.
pub(super) struct RawTerminal(Termios);

impl RawTerminal {
    /// `None` when standard input is no terminal.
    pub(super) fn enter() -> Option<RawTerminal> {
        let stdin = rustix::stdio::stdin();
        if !isatty(stdin) {
            return None;
        }
        let before = tcgetattr(stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Now, &raw).ok()?;
        Some(RawTerminal(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no mode.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}
