//! Freezing a container: `cgroup.freeze` of cgroup v2.
//!
//! Frozen processes can be killed; every other signal waits for the thaw.

use std::fs;
use std::io;

use super::Cgroup;
use super::watch::Watch;

const FREEZE: &str = "cgroup.freeze";

impl Cgroup {
    /// Freezes every process in it and below it, and returns when all are frozen.
    /// A process in an uninterruptible system call is so only after it.
    ///
    /// # Errors
    /// `NotFound` when it does not exist.
    pub async fn freeze(&self) -> io::Result<()> {
        let events = Watch::open(&self.path().join("cgroup.events"))?;
        fs::write(self.path().join(FREEZE), "1")?;
        while events.value("frozen")? == 0 {
            events.changed().await?;
        }
        Ok(())
    }

    /// Lets its processes run again.
    ///
    /// # Errors
    /// `NotFound` when it does not exist.
    pub fn thaw(&self) -> io::Result<()> {
        fs::write(self.path().join(FREEZE), "0")
    }
}
