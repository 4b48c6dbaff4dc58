//! `pause` and `resume`: the container's processes, frozen in the guest.
//!
//! The record says `paused` before the guest is asked, and no longer after it
//! has failed: a command that dies in between leaves a container that `resume`
//! accepts, whether it is frozen or not.

use super::state::{ContainerRecord, Status};
use super::{Error, lock, start};
use crate::root::Root;

/// Freezes a container's processes and returns when all are frozen.
///
/// # Errors
/// [`Error::NotRunning`] (as runc, also for one that is paused), else see
/// [`Error`]; the container is not paused then.
pub fn pause(root: &Root, id: &str) -> Result<(), Error> {
    let _lock = lock(root, id)?;
    let mut record = ContainerRecord::read(root, id)?;
    match record.status(root) {
        Status::Created | Status::Running => {}
        Status::Paused | Status::Stopped | Status::Creating => return Err(Error::NotRunning),
    }
    let agent = start::connect(root, &record.sandbox_id)?;
    record.paused = true;
    record.write(root)?;
    let Err(error) = agent.pause_container(id) else {
        return Ok(());
    };
    // One that did not answer may still be at it.
    if let Err(e) = agent.resume_container(id) {
        log::debug!("resuming after a failed pause: {e}");
    }
    record.paused = false;
    record.write(root)?;
    if error.is_wrong_state() {
        return Err(Error::NotRunning);
    }
    Err(Error::Agent(error))
}

/// Lets the processes of a paused container run again.
///
/// # Errors
/// [`Error::NotPaused`], else see [`Error`].
pub fn resume(root: &Root, id: &str) -> Result<(), Error> {
    let _lock = lock(root, id)?;
    let mut record = ContainerRecord::read(root, id)?;
    if record.status(root) != Status::Paused {
        return Err(Error::NotPaused);
    }
    start::connect(root, &record.sandbox_id)?
        .resume_container(id)
        .map_err(Error::Agent)?;
    record.paused = false;
    Ok(record.write(root)?)
}
