//! `kill`: a signal to the container's process, or to all of its processes.

use std::time::Duration;

use super::state::{ContainerRecord, Status};
use super::{Error, check_id, signal, start};
use crate::root::Root;
use crate::sys::process::ProcessRef;

/// How long a killed stand-in may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Sends a signal given by name or number.
///
/// # Errors
/// [`Error::NotRunning`] when there is no process, unless `all` is set: then
/// what the container's own process has left gets the signal, if anything, as with
/// runc.
pub fn kill(root: &Root, id: &str, signal: &str, all: bool) -> Result<(), Error> {
    check_id(id)?;
    let record = ContainerRecord::read(root, id)?;
    let signal = signal::parse(signal)?;
    match record.status(root) {
        Status::Created | Status::Running | Status::Paused => {}
        Status::Stopped if all => {
            signal_the_rest(root, &record, signal);
            return Ok(());
        }
        Status::Creating if all => return Ok(()),
        Status::Stopped | Status::Creating => return Err(Error::NotRunning),
    }
    match signal {
        // Only asks whether there is a process (kill(2)).
        0 => return Ok(()),
        1..=signal::MAX => {}
        _ => return Err(Error::InvalidSignal),
    }
    let sent = start::connect(root, &record.sandbox_id).and_then(|agent| {
        agent
            .signal(id, signal.unsigned_abs(), all)
            .map_err(Error::Agent)
    });
    match sent {
        Ok(()) => Ok(()),
        Err(Error::Agent(e)) if e.is_wrong_state() || e.is_not_found() => {
            if all {
                Ok(())
            } else {
                Err(Error::NotRunning)
            }
        }
        // A guest that does not answer is not in the way of SIGKILL: the end of
        // the stand-in is the end of the process, and delete ends the VM.
        Err(e) if signal == libc::SIGKILL => {
            log::warn!("{e}; killing the container's stand-in instead");
            end_standin(record.standin)
        }
        Err(e) => Err(e),
    }
}

/// A container that shares its pid namespace leaves processes behind when its own
/// ends. That there are none is no error.
fn signal_the_rest(root: &Root, record: &ContainerRecord, signal: i32) {
    if !(1..=signal::MAX).contains(&signal) || record.live_sandbox(root).is_none() {
        return;
    }
    let sent = start::connect(root, &record.sandbox_id).and_then(|agent| {
        agent
            .signal(&record.id, signal.unsigned_abs(), true)
            .map_err(Error::Agent)
    });
    if let Err(e) = sent {
        log::debug!("{}: {e}", record.id);
    }
}

fn end_standin(standin: Option<ProcessRef>) -> Result<(), Error> {
    standin.map_or(Ok(()), |process| {
        process
            .kill(KILL_DEADLINE)
            .map_err(super::context("killing the stand-in"))
    })
}
