//! Reporting kills for lack of memory (`oom_kill` of `memory.events`).
//!
//! Nothing is watched before somebody asks: most containers are never asked
//! about. When a container's own process has ended, the count is looked at in any
//! case: engines ask then whether there was memory enough. The kernel announces changes
//! a little late (it limits their rate), so that look is needed for the last kills, too.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::OnceCell;

use super::Cgroup;
use super::watch::{Watch, value_of};
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
    end: OnceCell<()>,
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
            end: OnceCell::new(),
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

    /// To be called before the end of a container's own process is reported,
    /// wherever that is done. If processes of the container were killed for lack of
    /// memory, that is reported whether anybody asked for it or not, and the host has
    /// noted it when this returns.
    pub async fn before_the_end(&self) {
        self.end.get_or_init(|| self.report_end()).await;
    }

    async fn report_end(&self) {
        let kills = match self.file.get() {
            Some(file) => file.value(KILLS).ok(),
            None => self.kills_now().ok(),
        };
        if let Some(kills @ 1..) = kills {
            let before = self.reported.swap(kills, Ordering::Relaxed);
            self.events
                .last_oom(&self.container_id, kills.saturating_sub(before))
                .await;
        }
    }

    fn kills_now(&self) -> io::Result<u64> {
        let content = std::fs::read_to_string(self.cgroup.path().join("memory.events"))?;
        Ok(value_of(&content, KILLS))
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
