//! A process of a container, as the agent knows it: a pidfd, its end, and its
//! terminal.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::helper::{hang_terminal_up, set_terminal_size};
use crate::reaper::{ExitReceiver, ExitStatus};
use crate::streams::Connection;
use crate::sys;

#[derive(Debug, thiserror::Error)]
pub enum SignalError {
    #[error("container not running")]
    NotRunning,
    #[error("invalid signal {0}")]
    Invalid(i32),
    #[error("sending a signal or hanging up: {0}")]
    Io(io::Error),
}

/// A process of a container, from its creation on.
pub struct Process {
    pub pid: i32,
    pidfd: OwnedFd,
    exit: ExitReceiver,
    /// Its program has been told to start.
    started: AtomicBool,
    /// Signal it counts as killed by, see [`Process::signal`]; 0 for none.
    counts_as: AtomicU32,
    terminal: Option<Connection>,
}

impl Process {
    /// The created process `pid`, a child of this process or about to be.
    ///
    /// # Errors
    /// Of pidfd_open(2).
    pub fn new(pid: i32, exit: ExitReceiver, terminal: Option<Connection>) -> io::Result<Process> {
        Ok(Process {
            pid,
            pidfd: sys::pidfd_open(pid)?,
            exit,
            started: AtomicBool::new(false),
            counts_as: AtomicU32::new(0),
            terminal,
        })
    }

    /// Its end, for tasks of their own.
    pub fn exit(&self) -> ExitReceiver {
        self.exit.clone()
    }

    /// A descriptor that means it and no later process.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Its terminal, if it has one.
    pub fn terminal(&self) -> Option<&Connection> {
        self.terminal.as_ref()
    }

    /// Notes that its program is about to start; false if that was noted before.
    pub fn note_start(&self) -> bool {
        !self.started.swap(true, Ordering::Relaxed)
    }

    /// Whether its program was started.
    pub fn is_started(&self) -> bool {
        self.started.load(Ordering::Relaxed)
    }

    /// Sends a signal.
    ///
    /// Before the start there is no program yet that could handle it, and as the
    /// first process of a pid namespace it is immune to what it does not handle;
    /// what would end a program ends it then, and counts as the reason.
    ///
    /// # Errors
    /// `NotRunning` when it has ended.
    pub fn signal(&self, signal: i32) -> Result<(), SignalError> {
        let mut deliver = signal;
        if !self.started.load(Ordering::Relaxed) && ends_by_default(signal) {
            self.counts_as
                .store(signal.unsigned_abs(), Ordering::Relaxed);
            deliver = libc::SIGKILL;
        }
        match sys::pidfd_send_signal(&self.pidfd, deliver) {
            Ok(()) if self.exit.borrow().is_none() => Ok(()),
            Ok(()) => Err(SignalError::NotRunning),
            Err(e) => Err(match e.raw_os_error() {
                Some(libc::ESRCH) => SignalError::NotRunning,
                Some(libc::EINVAL) => SignalError::Invalid(signal),
                _ => SignalError::Io(e),
            }),
        }
    }

    /// Sets the size of its terminal; without one there is nothing to do.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn resize(&self, rows: u16, cols: u16) -> io::Result<()> {
        match &self.terminal {
            Some(terminal) => set_terminal_size(terminal.fd(), rows, cols),
            None => Ok(()),
        }
    }

    /// Hangs its terminal up, as if the other end of a line were gone: its
    /// session gets SIGHUP, and whoever reads from the terminal the end of file.
    ///
    /// # Errors
    /// Of the system calls.
    pub fn hang_up(&self) -> Result<(), SignalError> {
        if !self.started.load(Ordering::Relaxed) {
            // There is no session yet that could be told.
            return self.signal(libc::SIGHUP);
        }
        match &self.terminal {
            Some(terminal) => hang_terminal_up(terminal.fd()).map_err(SignalError::Io),
            None => Ok(()),
        }
    }

    /// Waits for its end.
    pub async fn ended(&self) -> ExitStatus {
        let mut exit = self.exit.clone();
        // The sender is dropped only after it has sent.
        let status = match exit.wait_for(Option::is_some).await {
            Ok(status) => *status,
            Err(_) => None,
        };
        self.as_counted(status.unwrap_or(ExitStatus::Killed(libc::SIGKILL.unsigned_abs())))
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    fn as_counted(&self, status: ExitStatus) -> ExitStatus {
        const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();
        match (status, self.counts_as.load(Ordering::Relaxed)) {
            (ExitStatus::Killed(SIGKILL), signal) if signal != 0 => ExitStatus::Killed(signal),
            _ => status,
        }
    }
}

/// Whether a signal ends a process that does nothing about it (signal(7)).
fn ends_by_default(signal: i32) -> bool {
    !matches!(
        signal,
        libc::SIGCHLD
            | libc::SIGURG
            | libc::SIGWINCH
            | libc::SIGCONT
            | libc::SIGSTOP
            | libc::SIGTSTP
            | libc::SIGTTIN
            | libc::SIGTTOU
    ) && (1..=64).contains(&signal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};
    use tokio::sync::watch;

    fn sleeper() -> (Child, Process, watch::Sender<Option<ExitStatus>>) {
        let child = Command::new("sleep")
            .arg("100")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let (sender, exit) = watch::channel(None);
        let pid = i32::try_from(child.id()).unwrap();
        (child, Process::new(pid, exit, None).unwrap(), sender)
    }

    fn killed(signal: i32) -> ExitStatus {
        ExitStatus::Killed(signal.unsigned_abs())
    }

    #[test]
    fn a_created_process_is_ended_by_what_would_end_its_program() {
        use std::os::unix::process::ExitStatusExt;
        let (mut child, process, _exit) = sleeper();
        process.signal(libc::SIGWINCH).unwrap();
        process.signal(libc::SIGTERM).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert_eq!(
            process.as_counted(killed(libc::SIGKILL)),
            killed(libc::SIGTERM)
        );
    }

    #[test]
    fn a_started_process_gets_the_signal_itself() {
        use std::os::unix::process::ExitStatusExt;
        let (mut child, process, exit) = sleeper();
        assert!(process.note_start());
        assert!(!process.note_start());
        process.signal(libc::SIGTERM).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
        exit.send_replace(Some(killed(libc::SIGTERM)));
        assert!(process.has_ended());
        assert!(matches!(
            process.signal(libc::SIGTERM),
            Err(SignalError::NotRunning)
        ));
    }

    #[test]
    fn real_time_signals_end_a_process_and_job_control_does_not() {
        assert!(ends_by_default(40));
        assert!(ends_by_default(libc::SIGTERM));
        for signal in [0, 65, libc::SIGCHLD, libc::SIGCONT, libc::SIGTSTP] {
            assert!(!ends_by_default(signal));
        }
    }
}
