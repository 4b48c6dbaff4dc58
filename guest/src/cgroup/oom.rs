//! Reporting kills for lack of memory (`oom_kill` of `memory.events`).
//!
//! Nothing is watched before somebody asks: most containers are never asked
//! about. The kernel announces changes a little late (it limits their rate), so
//! the end of the container's process looks once more and the report of its kill
//! is sent before the report of its end.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::Cgroup;
use super::watch::Watch;
use crate::events::Events;
use crate::process::Process;
use crate::sys;

const KILLS: &str = "oom_kill";

/// Reports the kills of one container.
pub struct OomWatch {
    container_id: String,
    cgroup: Cgroup,
    events: Events,
    file: OnceLock<Watch>,
    reported: AtomicU64,
}

impl OomWatch {
    #[must_use]
    pub fn new(container_id: &str, cgroup: &Cgroup, events: &Events) -> Arc<OomWatch> {
        Arc::new(OomWatch {
            container_id: container_id.to_owned(),
            cgroup: cgroup.clone(),
            events: events.clone(),
            file: OnceLock::new(),
            reported: AtomicU64::new(0),
        })
    }

    /// Reports what happens from now on until the process has ended. Again is as
    /// good as once.
    ///
    /// # Errors
    /// Of opening the file.
    pub fn start(self: &Arc<Self>, process: &Arc<Process>) -> io::Result<()> {
        if self.file.get().is_some() {
            return Ok(());
        }
        let file = Watch::open(&self.cgroup.path().join("memory.events"))?;
        self.reported.store(file.value(KILLS)?, Ordering::Relaxed);
        // One thread: nobody else was here since the check above.
        drop(self.file.set(file));
        let (this, process) = (Arc::clone(self), Arc::clone(process));
        sys::spawn(async move {
            let Some(file) = this.file.get() else { return };
            loop {
                tokio::select! {
                    changed = file.changed() => if changed.is_err() { return },
                    _ = process.ended() => return,
                }
                this.report();
            }
        });
        Ok(())
    }

    /// Reports kills that were not reported yet, if anybody asked for them.
    pub fn report(&self) {
        let Some(kills) = self.file.get().and_then(|file| file.value(KILLS).ok()) else {
            return;
        };
        let before = self.reported.swap(kills, Ordering::Relaxed);
        if kills > before {
            self.events.oom(&self.container_id, kills - before);
        }
    }
}
