//! Reaping: every process that loses its parent becomes the agent's child.
//!
//! `waitpid` on anything is the only way to get at adopted orphans, and it also
//! returns the containers' own processes; so there is one loop, and whoever is
//! interested in a process says so before it can be reaped (see zygote.rs).

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::signal::unix::{SignalKind, signal};
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
    /// Starts the loop on the current runtime.
    ///
    /// # Errors
    /// Of installing the signal handler.
    pub fn start() -> io::Result<Arc<Reaper>> {
        let reaper = Arc::new(Reaper::default());
        let mut children = signal(SignalKind::child())?;
        let this = Arc::clone(&reaper);
        sys::spawn(async move {
            loop {
                this.reap_all();
                if children.recv().await.is_none() {
                    return;
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
