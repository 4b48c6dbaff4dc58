//! Which container a namespace of the host is of.

use std::ffi::OsStr;
use std::fs;
use std::path::{Component, Path};

use kuasar_runv_protocol::namespace::Kind;

use super::Error;
use crate::container::execs;
use crate::container::state::ContainerRecord;
use crate::root::Root;
use crate::standin;
use crate::sys::namespace::{self, Id, Namespace};
use crate::sys::process::{ProcessRef, boot_id};

/// A container that owns or shares a namespace.
#[derive(Debug)]
pub struct Owner {
    pub id: String,
}

/// Finds the live container whose stand-in is in the namespace at `path`. Of the
/// kinds that stand-ins have of their own, the open namespace comes along, which is
/// the one that was looked at. `hint` is a container that may well be it.
///
/// # Errors
/// [`Error::NoNamespace`], [`Error::NotANamespace`].
pub fn find(
    root: &Root,
    kind: Kind,
    path: &Path,
    hint: Option<&str>,
) -> Result<(Option<Owner>, Option<Namespace>), Error> {
    let namespace =
        Namespace::open(path, kind.flag()).map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) => Error::NotANamespace {
                path: path.into(),
                kind: kind.name(),
            },
            _ => Error::NoNamespace {
                path: path.into(),
                source,
            },
        })?;
    let by_pid = pid_in(path, kind).and_then(|pid| of_process(root, pid));
    if !matches!(kind, Kind::Network | Kind::Ipc | Kind::Uts) {
        return Ok((by_pid.map(|record| Owner { id: record.id }), None));
    }
    let wanted = namespace.id();
    let owner = by_pid
        .filter(|record| is_in(record, kind, wanted))
        .or_else(|| {
            let record = ContainerRecord::read(root, hint?).ok()?;
            is_in(&record, kind, wanted).then_some(record)
        })
        .or_else(|| search(root, kind, wanted));
    Ok((owner.map(|record| Owner { id: record.id }), Some(namespace)))
}

/// `PID` of `/proc/PID/ns/KIND`.
fn pid_in(path: &Path, kind: Kind) -> Option<i32> {
    let parts: Vec<&OsStr> = path
        .components()
        .map(|component| match component {
            Component::Normal(part) => Some(part),
            Component::RootDir => Some(OsStr::new("/")),
            _ => None,
        })
        .collect::<Option<_>>()?;
    match parts[..] {
        [root, proc, pid, ns, file]
            if root == "/" && proc == "proc" && ns == "ns" && file == kind.file() =>
        {
            pid.to_str()?.parse().ok()
        }
        _ => None,
    }
}

/// The container that a process stands for, or an exec in it. What the process says
/// of itself is only where to look: the record decides.
fn of_process(root: &Root, pid: i32) -> Option<ContainerRecord> {
    let process = ProcessRef::of(pid).ok()?;
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut arguments = arguments.split(|byte| *byte == 0).skip(1);
    if arguments.next()? != standin::COMMAND.as_bytes() {
        return None;
    }
    let id = std::str::from_utf8(arguments.next()?).ok()?;
    super::super::check_id(id).ok()?;
    let record = ContainerRecord::read(root, id).ok()?;
    if boot_id().ok()? != record.boot_id {
        return None;
    }
    let is_its_own = record.standin == Some(process)
        || execs::running(root, id).is_ok_and(|execs| execs.contains(&process));
    is_its_own.then_some(record)
}

/// Whether the live stand-in of a container is in a namespace.
fn is_in(record: &ContainerRecord, kind: Kind, wanted: Id) -> bool {
    let Some(standin) = record.standin else {
        return false;
    };
    let path = format!("/proc/{}/ns/{}", standin.pid, kind.file());
    // Looked at first: if it is still alive then, it was its own.
    namespace::id_at(Path::new(&path)).is_ok_and(|id| id == wanted)
        && standin.is_alive()
        && boot_id().is_ok_and(|boot| boot == record.boot_id)
}

/// Looks at every container, for paths that name no process. Of those that share
/// the namespace, the one that did not join it lives longest.
fn search(root: &Root, kind: Kind, wanted: Id) -> Option<ContainerRecord> {
    let entries = fs::read_dir(root.containers()).ok()?;
    let mut found = None;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let record = name.to_str().map(|id| ContainerRecord::read(root, id));
        let Some(Ok(record)) = record else { continue };
        if is_in(&record, kind, wanted) {
            let has_joined = record.joins.contains_key(kind.name());
            found = Some(record);
            if !has_joined {
                break;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_is_taken_from_the_one_form() {
        let pid = |path: &str| pid_in(Path::new(path), Kind::Network);
        assert_eq!(pid("/proc/42/ns/net"), Some(42));
        for other in [
            "/proc/42/ns/ipc",
            "/proc/self/ns/net",
            "/proc/42/task/42/ns/net",
            "/run/netns/x",
            "proc/42/ns/net",
            "/proc/../proc/42/ns/net",
        ] {
            assert_eq!(pid(other), None, "{other}");
        }
    }
}
