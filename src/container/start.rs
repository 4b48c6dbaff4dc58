//! `start`: lets the waiting process execute its program.

use super::state::{ContainerRecord, Phase, Status};
use super::{Error, hooks, kill, lock, network};
use crate::agent_client::{self, Agent};
use crate::root::Root;
use crate::sandbox::{Guest, Sandbox};

/// Starts a created container.
///
/// # Errors
/// See [`Error`].
pub fn start(root: &Root, id: &str) -> Result<(), Error> {
    let _lock = lock(root, id)?;
    let mut record = ContainerRecord::read(root, id)?;
    match record.status(root) {
        Status::Created => {}
        Status::Paused => return Err(Error::StartPaused),
        Status::Running => return Err(Error::AlreadyRunning),
        Status::Stopped => return Err(Error::HasStopped),
        Status::Creating => return Err(Error::StillCreating),
    }
    if record.has_network {
        network::connect(&Sandbox::open(root, &record.sandbox_id)?, &record)?;
    }
    let agent = connect(root, &record.sandbox_id)?;
    let started = start_in_guest(&agent, id);
    if matches!(started, Ok(()) | Err(Error::AlreadyRunning)) {
        record.phase = Phase::Started;
        record.write(root)?;
    }
    started?;
    let state = hooks::State::of(&record, Status::Running);
    if let Err(e) = hooks::run(&record.hooks.poststart, &state, None, None) {
        // The error to report is the hook's; the process may have ended.
        if let Err(left) = kill::kill(root, id, "KILL", true) {
            log::warn!("killing the container after a failed hook: {left}");
        }
        return Err(Error::Hook(e));
    }
    Ok(())
}

/// Asks the agent to start the container.
///
/// # Errors
/// See [`Error`].
pub fn start_in_guest(agent: &Agent, id: &str) -> Result<(), Error> {
    agent.start_container(id).map_err(|e| match e {
        // A `start` that was killed before it could write the record.
        e if e.is_wrong_state() => Error::AlreadyRunning,
        agent_client::Error::Refused { message, .. } => Error::Process(message),
        other => Error::Agent(other),
    })
}

/// A connection to the agent of a running VM.
///
/// # Errors
/// See [`Error`].
pub fn connect(root: &Root, sandbox_id: &str) -> Result<Agent, Error> {
    Ok(Guest::open(root, sandbox_id)?.agent()?)
}
