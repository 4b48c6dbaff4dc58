//! A container in the VM of another one: its turn to be created, and its leaving.
//!
//! The host decides what there is: its part of a container can be removed when the
//! guest does not answer. What the guest still has of it then has no process any
//! more, because its stand-in is gone, and goes when the id is used again, or with
//! the VM.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use super::state::ContainerRecord;
use super::{Error, context, guest_volumes, membership};
use crate::root::Root;
use crate::sandbox::control::{Heir, Unused};
use crate::sandbox::record::SandboxRecord;
use crate::sandbox::{self, Sandbox};
use crate::sys::lock::DirLock;
use crate::sys::process::ProcessRef;

/// How long the guest may take when nobody would wait for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long those before it may take.
const TURN_DEADLINE: Duration = Duration::from_secs(300);

/// Waits for a member's turn to be created. The guest makes one container at a time;
/// if all that are created at once asked it, the last would wait longer than a single
/// one may take. `None` for a container that has its VM alone.
///
/// # Errors
/// [`Error::Busy`], or that the VM has ended.
pub fn take_turn(root: &Root, record: &ContainerRecord) -> Result<Option<DirLock>, Error> {
    if record.member_of.is_none() {
        return Ok(None);
    }
    match DirLock::acquire(&root.sandbox(&record.sandbox_id), TURN_DEADLINE) {
        Ok(turn) => Ok(Some(turn)),
        Err(e) if e.kind() == io::ErrorKind::TimedOut => Err(Error::Busy),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(membership::Error::Ended {
            id: record.sandbox_id.clone(),
        }
        .into()),
        Err(e) => Err(context("locking the sandbox")(e)),
    }
}

/// What it means that sandboxer or guest do not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    IsAnError,
    IsLeftBehind,
}

/// Takes a member out of its VM, which stays. When the VM has ended there is nothing
/// to do.
///
/// # Errors
/// See [`Error`]; none with [`Unreachable::IsLeftBehind`].
pub fn leave(root: &Root, record: &ContainerRecord, guest: Unreachable) -> Result<(), Error> {
    let is_there = || record.live_sandbox(root).is_some();
    let (Some(sandboxer), true) = (record.member_of, is_there()) else {
        return Ok(());
    };
    let patience = (guest == Unreachable::IsLeftBehind).then_some(PATIENCE);
    match remove(root, &record.sandbox_id, sandboxer, &record.id, patience) {
        Ok(()) => Ok(()),
        // It may have ended meanwhile.
        Err(e) if guest == Unreachable::IsAnError && is_there() => Err(e),
        Err(e) => {
            log::warn!("removing {} from its virtual machine: {e}", record.id);
            Ok(())
        }
    }
}

/// Takes a container whose record cannot be read out of whatever VM it is in.
pub fn leave_any(root: &Root, id: &str) {
    let Ok(entries) = fs::read_dir(root.sandboxes()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let record = SandboxRecord::read(root, name);
        let Some(sandboxer) = record
            .ok()
            .filter(SandboxRecord::is_alive)
            .and_then(|r| r.sandboxer)
        else {
            continue;
        };
        if let Err(e) = remove(root, name, sandboxer, id, Some(PATIENCE)) {
            log::debug!("removing {id} from the virtual machine of {name}: {e}");
        }
    }
}

fn remove(
    root: &Root,
    sandbox_id: &str,
    sandboxer: ProcessRef,
    id: &str,
    patience: Option<Duration>,
) -> Result<(), Error> {
    let mut sandbox = Sandbox::join(root, sandbox_id, sandboxer)?;
    if let Some(patience) = patience {
        sandbox.limit_patience(patience);
    }
    // First, so that the guest forgets the files when it looks for them.
    let unshared = match sandbox.unshare(id) {
        // Without its sandboxer the guest cannot be reached either.
        Err(e @ sandbox::Error::Timeout(_)) => return Err(e.into()),
        unshared => unshared,
    };
    let disconnected = sandbox.disconnect_network(id, heirs(root, sandbox_id, id));
    remove_from_guest(&sandbox, id)?;
    let unused = unshared?;
    guest_volumes::take_apart(&sandbox, &unused)?;
    let released = sandbox.release(id);
    Ok(disconnected.and(released)?)
}

/// Most containers that are looked at.
const MAX_HEIRS: usize = 256;

/// The other containers of the pod that run, with their network namespaces.
fn heirs(root: &Root, sandbox_id: &str, id: &str) -> Vec<Heir> {
    let Ok(entries) = fs::read_dir(root.containers()) else {
        return Vec::new();
    };
    let heir = |other: &str| {
        let record = ContainerRecord::read(root, other).ok()?;
        if record.sandbox_id != sandbox_id || other == id {
            return None;
        }
        let standin = record.standin?;
        let namespace = fs::metadata(format!("/proc/{}/ns/net", standin.pid)).ok()?;
        // Asked afterwards, so that it cannot be another process's.
        standin.is_alive().then(|| Heir {
            id: other.to_owned(),
            standin,
            namespace: (namespace.dev(), namespace.ino()),
        })
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    names
        .filter_map(|name| heir(name.to_str()?))
        .take(MAX_HEIRS)
        .collect()
}

/// Removes what a container of the same id has left in the shared directory, because
/// its sandboxer did not answer when it was deleted: the id is another's now.
///
/// # Errors
/// See [`Error`].
pub fn take_id(sandbox: &Sandbox, id: &str) -> Result<(), Error> {
    let unused = sandbox.unshare(id)?;
    if unused == Unused::default() {
        return Ok(());
    }
    remove_from_guest(sandbox, id)?;
    guest_volumes::take_apart(sandbox, &unused)?;
    Ok(())
}

/// Removes what the guest has of a container, if anything.
///
/// # Errors
/// See [`Error`].
pub fn remove_from_guest(sandbox: &Sandbox, id: &str) -> Result<(), Error> {
    match sandbox.agent()?.delete_container(id) {
        Err(e) if !e.is_not_found() => Err(Error::Agent(e)),
        _ => Ok(()),
    }
}
