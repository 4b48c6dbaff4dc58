//! `delete`: ends what is left of a container and removes every trace of it.

use std::time::Duration;

use super::pod::{self, Unreachable};
use super::state::{ContainerRecord, RecordError, Status};
use super::{Error, cgroup, check_id, context, execs, guest_volumes, hooks, lock, network};
use crate::root::{self, Root};
use crate::sandbox;

/// How long a killed stand-in may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Deletes a container. One that runs is deleted only with `force`, and with
/// `force` one that does not exist is no error.
///
/// # Errors
/// See [`Error`].
pub fn delete(root: &Root, id: &str, force: bool) -> Result<(), Error> {
    check_id(id)?;
    let _lock = match lock(root, id) {
        Ok(lock) => lock,
        Err(Error::NotFound) if force => {
            // A crash in between may have left only the sandbox.
            return Ok(sandbox::end(root, id)?);
        }
        Err(e) => return Err(e),
    };
    match ContainerRecord::read(root, id) {
        Ok(record) => match record.status(root) {
            // A created container's process has run nothing yet (as runc).
            Status::Stopped | Status::Created => {}
            _ if force => {}
            status => {
                return Err(Error::NotStopped {
                    id: id.to_owned(),
                    status,
                });
            }
        },
        // What cannot be read was left by a crash or another version.
        Err(_) if force => {}
        Err(e) => return Err(e.into()),
    }
    let guest = match force {
        true => Unreachable::IsLeftBehind,
        false => Unreachable::IsAnError,
    };
    destroy(root, id, guest)
}

/// Ends and removes everything that belongs to a container, whatever state it
/// is in. The caller holds its lock. `guest` is about the guest of a VM that stays
/// because it is another container's.
///
/// # Errors
/// What could not be ended or removed; calling it again goes on from there.
pub fn destroy(root: &Root, id: &str, guest: Unreachable) -> Result<(), Error> {
    let record = match ContainerRecord::read(root, id) {
        Ok(record) => Some(record),
        Err(RecordError::NotFound | RecordError::Invalid { .. }) => None,
        Err(e) => return Err(e.into()),
    };
    let same_boot = record
        .as_ref()
        .is_some_and(|r| crate::sys::process::boot_id().is_ok_and(|boot| boot == r.boot_id));
    if let Some(standin) = record.as_ref().and_then(|r| r.standin)
        && same_boot
    {
        standin
            .kill(KILL_DEADLINE)
            .map_err(context("killing the stand-in"))?;
    }
    // From here on nobody can start another.
    let _no_more = execs::end_all(root, id, same_boot, KILL_DEADLINE)?;
    match &record {
        Some(record) if record.member_of.is_some() => pod::leave(root, record, guest)?,
        Some(record) => {
            if same_boot {
                guest_volumes::write_back(root, &record.sandbox_id);
            }
            sandbox::end(root, &record.sandbox_id)?;
        }
        None => {
            sandbox::end(root, id)?;
            pod::leave_any(root, id);
        }
    }
    if let Some(record) = &record {
        network::clean(record);
        cgroup::remove(&record.cgroups).map_err(context("cleaning up"))?;
        // Before the id is free: hooks undo by id, and a delete that is killed
        // here is repeated as a whole.
        hooks::run_all(
            &record.hooks.poststop,
            &hooks::State::of(record, Status::Stopped),
        );
    }
    execs::remove_dir(root, id)?;
    root::remove_private_dir(&root.container(id)).map_err(context(format!(
        "removing {}",
        root.container(id).display()
    )))
}
