//! `update`: other limits for a container that exists.
//!
//! Limits are those of the container's cgroup in the guest. The cgroup on the
//! host has none, from `create` on: the hypervisor is in it, and a limit of
//! memory there would kill the virtual machine for what its kernel, its page
//! cache or the hypervisor itself takes.

use super::limits::{self, Machine};
use super::resources::Resources;
use super::state::{ContainerRecord, Status};
use super::{Error, lock, start};
use crate::agent_client::{self, Agent};
use crate::root::Root;
use crate::sandbox::record::SandboxRecord;

/// Changes limits: all of them, or on failure none.
///
/// # Errors
/// See [`Error`].
pub fn update(root: &Root, id: &str, change: &Resources) -> Result<(), Error> {
    let _lock = lock(root, id)?;
    let mut record = ContainerRecord::read(root, id)?;
    match record.status(root) {
        Status::Created | Status::Running | Status::Paused => {}
        Status::Stopped | Status::Creating => return Err(Error::NotRunning),
    }
    let sandbox = SandboxRecord::read(root, &record.sandbox_id)?;
    let machine = Machine {
        memory_mib: sandbox.memory_mib,
        vcpus: sandbox.vcpus,
    };
    let all = record.resources.with(change);
    let settings = limits::settings(&all, change, machine)?;
    let agent = start::connect(root, &record.sandbox_id)?;
    if change.memory.check_before_update == Some(true) {
        check_usage(&agent, id, change)?;
    }
    agent.update_container(id, settings).map_err(|e| match e {
        e if e.is_wrong_state() => Error::NotRunning,
        agent_client::Error::Refused { message, .. } => Error::Process(message),
        other => Error::Agent(other),
    })?;
    record.resources = all;
    Ok(record.write(root)?)
}

/// `checkBeforeUpdate`: rather no new limit than processes killed for it.
fn check_usage(agent: &Agent, id: &str, change: &Resources) -> Result<(), Error> {
    let usage = agent.stats(id).map_err(Error::Agent)?.memory.usage;
    match change.memory.limit {
        Some(limit) if limit > 0 && usage > limit.unsigned_abs() => {
            Err(Error::UsageAboveLimit { limit, usage })
        }
        _ => Ok(()),
    }
}
