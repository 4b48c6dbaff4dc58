//! Signals that ask a command to give up, as something to wait for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::seqpacket::wait_readable;

/// Holds SIGINT, SIGTERM and SIGHUP back, so that a command that is interrupted
/// can undo what it did. When dropped, a signal that has come takes its effect,
/// unless it was held back before.
pub struct Interrupt {
    signals: SignalFd,
    before: SigSet,
}

impl Interrupt {
    /// # Errors
    /// As sigprocmask(2) and signalfd(2).
    pub fn new() -> io::Result<Interrupt> {
        let set: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
            .into_iter()
            .collect();
        let before = set.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?;
        Ok(Interrupt { signals, before })
    }
}

impl Interrupt {
    /// Whether a signal has come.
    #[must_use]
    pub fn has_come(&self) -> bool {
        wait_readable(self.as_fd(), Duration::ZERO).unwrap_or(false)
    }

    /// Holds the signals back for the rest of the process, because there is nothing
    /// to undo any more.
    pub fn ignore(self) {
        std::mem::forget(self);
    }
}

impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        // Cannot fail with a mask that was in force.
        let _ = self.before.thread_set_mask();
    }
}
