//! Signals that ask a command to give up, as something to wait for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Holds SIGINT, SIGTERM and SIGHUP back, so that a command that is interrupted
/// can undo what it did. When dropped, a signal that has come takes its effect.
pub struct Interrupt {
    signals: SignalFd,
    set: SigSet,
}

impl Interrupt {
    /// # Errors
    /// As sigprocmask(2) and signalfd(2).
    pub fn new() -> io::Result<Interrupt> {
        let set: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
            .into_iter()
            .collect();
        set.thread_block()?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?;
        Ok(Interrupt { signals, set })
    }
}

impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        // Cannot fail with this set.
        let _ = self.set.thread_unblock();
    }
}
