//! The caller's own terminal, for a container that runs in its foreground.
//!
//! The guest's terminal does the line discipline: echo, Ctrl-C, Ctrl-Z, Ctrl-D.
//! The caller's passes bytes meanwhile ([`RawMode`]) and gets its mode back
//! however the command ends. Should the command be killed by SIGKILL, the stand-in
//! notices and does it (`standin::terminal`).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, getpgrp};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::termios::{
    OptionalActions, OutputModes, Termios, Winsize, isatty, tcgetattr, tcgetpgrp, tcgetwinsize,
    tcsetattr,
};
use serde_json::{Value, json};

use super::{Error, context};

/// Tries to become the foreground job. Each stops the process; only one that
/// cannot be stopped (nobody could continue it) gets to the end.
const FOREGROUND_TRIES: u32 = 100;

/// Refuses streams that do not fit together, in runc's words. `terminal`: the
/// process has one; `detached`: the caller does not stay to show it.
///
/// # Errors
/// [`Error::Unsupported`].
pub fn check_streams(terminal: bool, detached: bool, console_socket: bool) -> Result<(), Error> {
    let unsupported = |text: &str| Err(Error::Unsupported(text.to_owned()));
    match (detached && terminal, console_socket) {
        (true, false) => unsupported(
            "cannot allocate tty if kuasar-runv will detach without setting console socket",
        ),
        (false, true) => {
            unsupported("cannot use console socket if kuasar-runv will not detach or allocate tty")
        }
        _ => Ok(()),
    }
}

/// The terminal the caller sits at.
#[derive(Debug)]
pub struct CallersTerminal(OwnedFd);

impl CallersTerminal {
    /// Takes the terminal for this process, in the foreground. `process`, of a
    /// config.json, starts with its size.
    ///
    /// # Errors
    /// Without a terminal, or when it belongs to another job.
    pub fn take(process: &mut Value) -> Result<CallersTerminal, Error> {
        let terminal = CallersTerminal::find().map_err(context("open /dev/tty"))?;
        terminal
            .wait_for_foreground()
            .map_err(context("waiting for the terminal"))?;
        if let Some(size) = terminal.size() {
            process["consoleSize"] = json!({"height": size.ws_row, "width": size.ws_col});
        }
        Ok(terminal)
    }

    /// Standard error, output or input, whichever is a terminal, or else the
    /// controlling terminal: runc's order.
    ///
    /// # Errors
    /// As open(2) of `/dev/tty`, when there is none.
    fn find() -> io::Result<CallersTerminal> {
        for fd in [
            rustix::stdio::stderr(),
            rustix::stdio::stdout(),
            rustix::stdio::stdin(),
        ] {
            if isatty(fd) {
                return Ok(CallersTerminal(fd.try_clone_to_owned()?));
            }
        }
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        match openat(CWD, "/dev/tty", flags, Mode::empty()) {
            Ok(tty) => Ok(CallersTerminal(tty)),
            // runc's words.
            Err(Errno::NXIO) => Err(io::Error::other("no such device or address")),
            Err(e) => Err(e.into()),
        }
    }

    /// Its size, if anybody has given it one.
    fn size(&self) -> Option<Winsize> {
        let size = tcgetwinsize(&self.0).ok()?;
        ((size.ws_row, size.ws_col) != (0, 0)).then_some(size)
    }

    /// Stops as a background job that wants the terminal has to, until it is in
    /// the foreground: otherwise two would read the same keyboard.
    ///
    /// # Errors
    /// The terminal belongs to another job, and nobody is there to change that.
    fn wait_for_foreground(&self) -> io::Result<()> {
        let signal: SigSet = [Signal::SIGTTOU].into_iter().collect();
        for _ in 0..FOREGROUND_TRIES {
            match tcgetpgrp(&self.0) {
                Ok(group) if group.as_raw_nonzero().get() != getpgrp().as_raw() => {}
                // Ours; or not the controlling terminal, which has no jobs of ours.
                _ => return Ok(()),
            }
            // The caller may have blocked it, and then nothing would happen.
            let was_blocked = SigSet::thread_get_mask()?.contains(Signal::SIGTTOU);
            kill(Pid::from_raw(0), Signal::SIGTTOU)?;
            signal.thread_unblock()?;
            if was_blocked {
                signal.thread_block()?;
            }
        }
        Err(io::Error::other("the terminal belongs to another job"))
    }

    /// Switches to raw mode until the value is dropped.
    ///
    /// # Errors
    /// As tcsetattr(3).
    pub fn raw(self) -> io::Result<RawMode> {
        let before = tcgetattr(&self.0)?;
        let raw = RawMode {
            terminal: self.0,
            before,
        };
        raw.enter()?;
        Ok(raw)
    }
}

/// Raw mode; the mode before comes back when this is dropped.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// Again, after somebody else had the terminal while this process was stopped.
    ///
    /// # Errors
    /// As tcsetattr(3).
    pub fn enter(&self) -> io::Result<()> {
        let mut raw = self.before.clone();
        raw.make_raw();
        // As runc: what the container writes has plain line feeds, so that they are
        // plain where its output goes to a file; here they get their carriage return.
        raw.output_modes |= OutputModes::OPOST;
        Ok(tcsetattr(
            self.terminal.as_fd(),
            OptionalActions::Now,
            &raw,
        )?)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no mode.
        let _ = tcsetattr(self.terminal.as_fd(), OptionalActions::Now, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::termios::LocalModes;

    #[test]
    fn the_mode_comes_back_also_when_the_caller_panics() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let echoes = || {
            let mode = tcgetattr(&pty.slave).unwrap();
            mode.local_modes.contains(LocalModes::ECHO)
        };
        assert!(echoes());
        let panicked = std::panic::catch_unwind(|| {
            let slave = pty.slave.try_clone().unwrap();
            let _raw = CallersTerminal(slave).raw().unwrap();
            assert!(!echoes());
            panic!("on purpose");
        });
        assert!(panicked.is_err());
        assert!(echoes());
    }

    #[test]
    fn a_terminal_without_a_size_or_jobs_is_no_obstacle() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let terminal = CallersTerminal(pty.slave);
        assert!(terminal.size().is_none());
        terminal.wait_for_foreground().unwrap();
    }
}
