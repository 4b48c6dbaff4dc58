//! Pausing, limits and statistics of a container: what is done to its cgroup.

use std::time::Duration;

use kuasar_runv_protocol::agent::GetStatsResponse;
use tokio::time::timeout;

use super::{Container, ContainerError, Containers, Result};
use crate::cgroup::settings::Setting;
use crate::process::SignalError;

/// How long freezing may take: a process in an uninterruptible system call, such
/// as one that waits for the host's file system, is frozen after it.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);

impl Container {
    /// Whether its processes are frozen, or about to be; nothing new is started in
    /// it then.
    pub(super) fn is_paused(&self) -> Result<bool> {
        self.cgroup
            .is_frozen()
            .map_err(ContainerError::io("reading the freezer's state"))
    }

    fn thaw(&self) -> Result<()> {
        self.cgroup
            .thaw()
            .map_err(ContainerError::io("thawing the container"))
    }
}

impl Containers {
    /// Freezes the container's processes and returns when all are frozen.
    ///
    /// # Errors
    /// `NotFound`, `NotRunning`, `Unfreezable`; nothing is frozen then.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let container = self.get(id)?;
        let not_running = || Err(SignalError::NotRunning.into());
        if container.process.has_ended() {
            return not_running();
        }
        let failed = match timeout(FREEZE_DEADLINE, container.cgroup.freeze()).await {
            Ok(Ok(())) if container.process.has_ended() => not_running(),
            Ok(Ok(())) => return Ok(()),
            Ok(Err(e)) => Err(ContainerError::io("freezing the container")(e)),
            Err(_) => Err(ContainerError::Unfreezable(FREEZE_DEADLINE)),
        };
        if let Err(e) = container.thaw() {
            log::error!("{id}: {e}");
        }
        failed
    }

    /// Lets the container's processes run again; without effect on one that is
    /// not paused.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn resume(&self, id: &str) -> Result<()> {
        self.get(id)?.thaw()
    }

    /// Changes limits: all of them, or on failure none.
    ///
    /// # Errors
    /// `NotFound`, `NotRunning`, `Setting`.
    pub async fn update(&self, id: &str, settings: Vec<Setting>) -> Result<()> {
        let container = self.get(id)?;
        if container.process.has_ended() {
            return Err(SignalError::NotRunning.into());
        }
        // The kernel makes the writer of a memory limit reclaim, which must not
        // hold up everything else.
        let cgroup = container.cgroup.clone();
        tokio::task::spawn_blocking(move || cgroup.apply(&settings))
            .await
            .map_err(ContainerError::io("changing limits"))?
            .map_err(Into::into)
    }

    /// What the kernel counts for the container; also after its process has ended.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn stats(&self, id: &str) -> Result<GetStatsResponse> {
        self.get(id)?
            .cgroup
            .stats()
            .map_err(ContainerError::io("reading statistics"))
    }

    /// Reports kills for lack of memory from now on.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn watch_oom(&self, id: &str) -> Result<()> {
        let container = self.get(id)?;
        container
            .oom
            .start(&container.process)
            .map_err(ContainerError::io("watching memory.events"))
    }
}
