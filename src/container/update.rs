//! `update`: other limits for a container that exists.
//!
//! Limits are those of the container's cgroup in the guest. The virtual machine grows
//! first when it is too small for them, and the cgroup on the host gets what belongs
//! there ([`cgroup::limits`]).

use super::cgroup::{self, limits::Holds};
use super::limits;
use super::resources::Resources;
use super::state::{ContainerRecord, Status};
use super::{Error, lock, size};
use crate::agent_client::{self, Agent};
use crate::root::Root;
use crate::sandbox::Sandbox;
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
    let most = SandboxRecord::read(root, &record.sandbox_id)?.most;
    let all = record.resources.with(change);
    let settings = limits::settings(&all, change, most)?;
    let sandbox = Sandbox::open(root, &record.sandbox_id)?;
    let agent = sandbox.agent()?;
    if change.memory.check_before_update == Some(true) {
        check_usage(&agent, id, change)?;
    }
    let size = sandbox.reserve(id, size::of_limits(&all))?;
    let holds = if record.sandbox_id == id {
        Holds::Vm {
            memory_mib: size.memory_mib,
        }
    } else {
        Holds::StandIn
    };
    cgroup::limits::apply(&record.cgroups, &all, holds);
    if let Some(scope) = &record.scope
        && let Err(e) = scope.set_limits(&all)
    {
        log::warn!("{e}");
    }
    if let Err(e) = agent.update_container(id, settings) {
        // The machine has grown for nothing, which harms nobody.
        if let Err(left) = sandbox.reserve(id, size::of_limits(&record.resources)) {
            log::warn!("taking back what was reserved: {left}");
        }
        cgroup::limits::apply(&record.cgroups, &record.resources, holds);
        return Err(match e {
            e if e.is_wrong_state() => Error::NotRunning,
            agent_client::Error::Refused { message, .. } => Error::Process(message),
            other => Error::Agent(other),
        });
    }
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
