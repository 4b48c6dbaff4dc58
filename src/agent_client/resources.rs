//! Calls about a container's cgroup: freezing, limits, statistics.

use kuasar_runv_protocol::agent::{
    CgroupSetting, GetStatsRequest, GetStatsResponse, PauseContainerRequest,
    ResumeContainerRequest, UpdateContainerRequest, WatchOomRequest,
};
use kuasar_runv_protocol::resources::GrowRequest;

use super::{Agent, Error};

impl Agent {
    /// Freezes the container; on failure nothing is frozen, as far as the guest
    /// answers.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn pause_container(&self, id: &str) -> Result<(), Error> {
        let request = PauseContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.stub
            .pause_container(self.context(), &request)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// # Errors
    /// See [`Error`].
    pub fn resume_container(&self, id: &str) -> Result<(), Error> {
        let request = ResumeContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.stub
            .resume_container(self.context(), &request)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// Changes limits: all, or on failure none.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn update_container(&self, id: &str, settings: Vec<CgroupSetting>) -> Result<(), Error> {
        let request = UpdateContainerRequest {
            container_id: id.to_owned(),
            settings,
            ..Default::default()
        };
        self.stub
            .update_container(self.context(), &request)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// Waits until the guest uses at least so many CPUs and, besides the memory it
    /// was booted with, so many MiB.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn grow(&self, vcpus: u32, added_memory_mib: u32) -> Result<(), Error> {
        let request = GrowRequest {
            vcpus,
            added_memory_mib,
            ..Default::default()
        };
        self.resources
            .grow(self.context(), &request)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// What the guest says it has counted. Numbers may be anything; the size is
    /// bounded by that of a message.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn stats(&self, id: &str) -> Result<GetStatsResponse, Error> {
        let request = GetStatsRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.stub
            .get_stats(self.context(), &request)
            .map_err(|e| self.error(e))
    }

    /// Has kills for lack of memory reported as events from now on.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn watch_oom(&self, id: &str) -> Result<(), Error> {
        let request = WatchOomRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.stub
            .watch_oom(self.context(), &request)
            .map(drop)
            .map_err(|e| self.error(e))
    }
}
