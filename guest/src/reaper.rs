//! Reaping: every process that loses its parent becomes the agent's child.
//!
//! `waitpid` on anything is the only way to get at adopted orphans, and it also
//! returns the containers' own processes; so there is one loop, and whoever is
//! interested in a process says so before it can be reaped (see zygote.rs).

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::Interest;
use tokio::sync::watch;

use crate::sys;

/// How a process ended, as in wait(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    Exited(u32),
    Killed(u32),
}

/// Holds the status once the process has ended.
pub type ExitReceiver = watch::Receiver<Option<ExitStatus>>;

/// Who waits for which process.
#[derive(Default)]
pub struct Reaper {
    watched: Mutex<HashMap<i32, watch::Sender<Option<ExitStatus>>>>,
}

impl Reaper {
    /// Starts the loop on the current runtime. Blocks SIGCHLD in this thread,
    /// the only one.
    ///
    /// # Errors
    /// Of making a signalfd.
    pub fn start() -> io::Result<Arc<Reaper>> {
        let reaper = Arc::new(Reaper::default());
        // A descriptor and not a handler: the frame of a handler, with the whole
        // state of the processor, is slow under emulation.
        let children = sys::child_signals()?;
        let children = sys::on_runtime(children, Interest::READABLE)?;
        let this = Arc::clone(&reaper);
        sys::spawn(async move {
            loop {
                this.reap_all();
                let Ok(mut ready) = children.readable().await else {
                    return;
                };
                // Signals merge, so what it says is only that there is work.
                let mut info = [0; std::mem::size_of::<libc::signalfd_siginfo>()];
                let read = nix::unistd::read(children.as_raw_fd(), &mut info);
                if read == Err(nix::Error::EAGAIN) {
                    ready.clear_ready();
                }
            }
        });
        Ok(reaper)
    }

    /// The exit of `pid`, which must not have been reaped yet.
    pub fn watch(&self, pid: i32) -> ExitReceiver {
        let (sender, receiver) = watch::channel(None);
        self.watched
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(pid, sender);
        receiver
    }

    fn reap_all(&self) {
        while let Some((pid, status)) = reap_one() {
            self.ended(pid, status);
        }
    }

    fn ended(&self, pid: i32, status: ExitStatus) {
        let watcher = self
            .watched
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&pid);
        if let Some(watcher) = watcher {
            watcher.send_replace(Some(status));
        }
    }
}

/// Reaps a child that has ended, if there is one.
///
/// Not nix's `waitpid`: it loses processes that were ended by a real-time signal.
fn reap_one() -> Option<(i32, ExitStatus)> {
    let mut status = 0;
    // SAFETY: the status is stored in a live int.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    if pid <= 0 {
        return None;
    }
    let ended = if libc::WIFEXITED(status) {
        ExitStatus::Exited(libc::WEXITSTATUS(status).unsigned_abs())
    } else {
        // Stops are not asked for.
        ExitStatus::Killed(libc::WTERMSIG(status).unsigned_abs())
    };
    Some((pid, ended))
}
