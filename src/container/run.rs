//! `run`: create and start in one go, and stay as long as the process does.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::create::{Options, create, trace};
use super::start::start_in_guest;
use super::state::Phase;
use super::terminal::{CallersTerminal, RawMode};
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
        created.connect_network()?;
        start_in_guest(&created.agent, &options.id)?;
        created.record_phase(Phase::Started)?;
        created.poststart()?;
        created.keep()?;
        return Ok(Outcome::Detached);
    }
    // Before there is any other thread: it would take the signals otherwise.
    let signals = all_signals()?;
    let mut created = create(root, options)?;
    let raw = match created.terminal.take().map(CallersTerminal::raw) {
        Some(raw) => Some(raw.map_err(context("setting the terminal to raw mode"))?),
        None => None,
    };
    created.connect_network()?;
    trace("network");
    created.check_interrupted()?;
    // From here on, `wait` passes on what has come meanwhile.
    start_in_guest(&created.agent, &options.id)?;
    trace("started");
    created.record_phase(Phase::Started)?;
    created.poststart()?;
    let standin = created.standin();
    // While it is open, the stand-in knows that somebody looks after the terminal.
    let attached = created.keep_attached()?;
    let code = wait(standin, &signals, raw.as_ref())?;
    trace("exited");
    drop((raw, attached));
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
pub(super) fn wait(
    standin: ProcessRef,
    signals: &SignalFd,
    raw: Option<&RawMode>,
) -> Result<u8, Error> {
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
                Ok(signal) => {
                    if let (Signal::SIGCONT, Some(raw)) = (signal, raw) {
                        // The terminal may be gone; that shows elsewhere.
                        let _ = raw.enter();
                    }
                    // It may just have ended.
                    let _ = kill(pid, signal);
                }
                Err(_) => {}
            }
        }
    }
}
