//! The record of one container, and the status derived from it.
//!
//! `state.json` is written before anything is spawned and says which processes
//! belong to the container. Status is never stored: it follows from how far the
//! set-up got and from which of those processes live.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cgroup::systemd::Scope;
use super::hooks::LateHooks;
use super::resources::Resources;
use crate::root::Root;
use crate::sandbox::network::served::Card;
use crate::sandbox::record::SandboxRecord;
use crate::sys::atomic_file;
use crate::sys::process::{ProcessRef, boot_id};

const FILE: &str = "state.json";
/// Version of the layout of `state.json`.
const SCHEMA: u32 = 1;

/// How far the life of a container got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// `create` works on it, or died.
    Creating,
    /// `create` has succeeded.
    Created,
    /// `start` has succeeded.
    Started,
}

/// The container's status as in the runtime specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        })
    }
}

/// `state.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerRecord {
    pub schema: u32,
    /// The boot it belongs to: after a reboot nothing of it is left.
    pub boot_id: String,
    pub id: String,
    pub oci_version: String,
    /// Absolute paths on the host.
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    /// RFC 3339 with nanoseconds, UTC.
    pub created: String,
    /// User name of who created it, empty for root (as runc).
    pub owner: String,
    pub annotations: BTreeMap<String, String>,
    /// The container whose VM it is in; its own id if that was made for it.
    pub sandbox_id: String,
    /// The sandboxer of that VM, if it was made for another container: a sandbox
    /// that is made anew is not the one this container is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member_of: Option<ProcessRef>,
    /// Containers whose namespaces it has joined, by `type` of config.json.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub joins: BTreeMap<String, String>,
    pub phase: Phase,
    /// The command that creates it; while it lives the status is `creating`.
    pub creator: ProcessRef,
    pub standin: Option<ProcessRef>,
    /// Its processes are frozen, see [`super::pause`].
    #[serde(default)]
    pub paused: bool,
    /// Limits asked for by `create` and every `update`.
    #[serde(default)]
    pub resources: Resources,
    /// Host cgroup directories made for it, to be removed with it.
    pub cgroups: Vec<PathBuf>,
    /// The unit of systemd that they are, to be ended with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
    /// It has a network namespace of its own, which the sandboxer looks after.
    #[serde(default)]
    pub has_network: bool,
    /// Where that namespace was found, if it was not made for the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_path: Option<PathBuf>,
    /// Its network cards that programs of the host serve.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub served_cards: Vec<Card>,
    /// What runs when the bundle may be gone.
    #[serde(default, skip_serializing_if = "LateHooks::is_empty")]
    pub hooks: LateHooks,
}

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("container does not exist")]
    NotFound,
    #[error("reading {}: {source}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "{} is not a record of this version of kuasar-runv ({reason}): remove the container with `kuasar-runv delete --force`",
        .path.display()
    )]
    Invalid { path: PathBuf, reason: String },
    #[error("writing {}: {source}", .path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// Reads a JSON record, refusing another schema.
///
/// # Errors
/// See [`RecordError`].
pub fn read_record<T: serde::de::DeserializeOwned>(
    path: &Path,
    schema: u32,
) -> Result<T, RecordError> {
    #[derive(Deserialize)]
    struct Version {
        schema: u32,
    }
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(RecordError::NotFound),
        Err(source) => {
            return Err(RecordError::Read {
                path: path.to_owned(),
                source,
            });
        }
    };
    let invalid = |reason: String| RecordError::Invalid {
        path: path.to_owned(),
        reason,
    };
    let version: Version = serde_json::from_slice(&text).map_err(|e| invalid(e.to_string()))?;
    if version.schema != schema {
        return Err(invalid(format!(
            "schema {}, this version writes {schema}",
            version.schema
        )));
    }
    serde_json::from_slice(&text).map_err(|e| invalid(e.to_string()))
}

/// Writes a JSON record atomically.
///
/// # Errors
/// [`RecordError::Write`].
pub fn write_record<T: Serialize>(path: &Path, record: &T) -> Result<(), RecordError> {
    let failed = |source| RecordError::Write {
        path: path.to_owned(),
        source,
    };
    let text = serde_json::to_vec(record).map_err(|e| failed(e.into()))?;
    atomic_file::write(path, &text, 0o600).map_err(failed)
}

impl ContainerRecord {
    /// A record of a container that is being created by this process.
    ///
    /// # Errors
    /// When /proc is not mounted.
    pub fn new(id: &str, sandbox_id: &str, bundle: &Path) -> io::Result<ContainerRecord> {
        Ok(ContainerRecord {
            schema: SCHEMA,
            boot_id: boot_id()?,
            id: id.to_owned(),
            oci_version: String::new(),
            bundle: bundle.to_owned(),
            rootfs: PathBuf::new(),
            created: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Nanos, true),
            owner: owner(),
            annotations: BTreeMap::new(),
            sandbox_id: sandbox_id.to_owned(),
            member_of: None,
            joins: BTreeMap::new(),
            phase: Phase::Creating,
            creator: ProcessRef::current()?,
            standin: None,
            paused: false,
            resources: Resources::default(),
            has_network: false,
            network_path: None,
            served_cards: Vec::new(),
            cgroups: Vec::new(),
            scope: None,
            hooks: LateHooks::default(),
        })
    }

    /// # Errors
    /// See [`RecordError`].
    pub fn read(root: &Root, id: &str) -> Result<ContainerRecord, RecordError> {
        read_record(&root.container(id).join(FILE), SCHEMA)
    }

    /// # Errors
    /// See [`RecordError`].
    pub fn write(&self, root: &Root) -> Result<(), RecordError> {
        write_record(&root.container(&self.id).join(FILE), self)
    }

    /// What is true of the container now. Needs neither the VM nor a lock.
    #[must_use]
    pub fn status(&self, root: &Root) -> Status {
        if boot_id().is_ok_and(|boot| boot != self.boot_id) {
            return Status::Stopped;
        }
        let alive =
            || self.standin.is_some_and(ProcessRef::is_alive) && self.live_sandbox(root).is_some();
        match self.phase {
            Phase::Creating if self.creator.is_alive() => Status::Creating,
            Phase::Created | Phase::Started if self.paused && alive() => Status::Paused,
            Phase::Created if alive() => Status::Created,
            Phase::Started if alive() => Status::Running,
            _ => Status::Stopped,
        }
    }

    /// The VM it is in, while that can still run anything.
    #[must_use]
    pub fn live_sandbox(&self, root: &Root) -> Option<SandboxRecord> {
        if boot_id().is_ok_and(|boot| boot != self.boot_id) {
            return None;
        }
        let sandbox = SandboxRecord::read(root, &self.sandbox_id).ok()?;
        let is_its_own = self.member_of.is_none() || self.member_of == sandbox.sandboxer;
        (is_its_own && sandbox.is_alive()).then_some(sandbox)
    }

    /// Pid of the stand-in while there is one, else 0 (as runc).
    #[must_use]
    pub fn pid(&self, status: Status) -> i32 {
        match (status, self.standin) {
            (Status::Created | Status::Running | Status::Paused, Some(standin)) => standin.pid,
            _ => 0,
        }
    }

    /// The runtime specification's version the bundle asked for, with the rest
    /// of `runc state`'s fields.
    #[must_use]
    pub fn to_oci_state<'a>(&'a self, status: Status, owner: &'a str) -> OciState<'a> {
        OciState {
            oci_version: &self.oci_version,
            id: &self.id,
            pid: self.pid(status),
            status: status.to_string(),
            bundle: &self.bundle,
            rootfs: &self.rootfs,
            created: &self.created,
            annotations: &self.annotations,
            owner,
        }
    }
}

/// What `state` and `list --format json` print, in runc's order.
#[derive(Serialize)]
pub struct OciState<'a> {
    #[serde(rename = "ociVersion")]
    pub oci_version: &'a str,
    pub id: &'a str,
    pub pid: i32,
    pub status: String,
    pub bundle: &'a Path,
    pub rootfs: &'a Path,
    pub created: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: &'a BTreeMap<String, String>,
    pub owner: &'a str,
}

/// Name of the calling user; runc prints root as an empty owner in `state` and
/// as `root` in `list`.
fn owner() -> String {
    let uid = nix::unistd::getuid();
    if uid.is_root() {
        return String::new();
    }
    // The static binary must not load name service plugins, so this reads the
    // file itself.
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    passwd
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let id = fields.nth(1)?;
            (id == uid.to_string()).then(|| name.to_owned())
        })
        .unwrap_or_else(|| format!("#{uid}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(Some(dir.path().to_owned()));
        root.create().unwrap();
        (dir, root)
    }

    fn record(root: &Root) -> ContainerRecord {
        crate::root::create_private_dir(&root.container("c1")).unwrap();
        ContainerRecord::new("c1", "c1", Path::new("/b")).unwrap()
    }

    #[test]
    fn a_record_survives_the_round_trip() {
        let (_dir, root) = root();
        let record = record(&root);
        record.write(&root).unwrap();
        let read = ContainerRecord::read(&root, "c1").unwrap();
        assert_eq!(read.creator, record.creator);
        assert_eq!(read.status(&root), Status::Creating);
    }

    #[test]
    fn a_container_whose_processes_are_gone_is_stopped_whatever_the_file_says() {
        let (_dir, root) = root();
        let gone = ProcessRef {
            pid: 1,
            start_time: u64::MAX,
        };
        for phase in [Phase::Creating, Phase::Created, Phase::Started] {
            let record = ContainerRecord {
                phase,
                creator: gone,
                standin: Some(gone),
                paused: true,
                ..ContainerRecord::new("c1", "c1", Path::new("/b")).unwrap()
            };
            assert_eq!(record.status(&root), Status::Stopped, "{phase:?}");
            assert_eq!(record.pid(Status::Stopped), 0);
        }
    }

    #[test]
    fn a_record_of_an_earlier_boot_is_stopped() {
        let (_dir, root) = root();
        let record = ContainerRecord {
            boot_id: "another".into(),
            ..record(&root)
        };
        assert_eq!(record.status(&root), Status::Stopped);
    }

    #[test]
    fn a_member_is_stopped_when_its_sandbox_is_another_one_of_that_id() {
        let (_dir, root) = root();
        let mut record = record(&root);
        record.phase = Phase::Started;
        record.standin = Some(record.creator);
        record.sandbox_id = "pod".into();
        let mut sandbox = SandboxRecord::new("pod", 1, &[]).unwrap();
        sandbox.sandboxer = Some(record.creator);
        crate::root::create_private_dir(&root.sandbox("pod")).unwrap();
        sandbox.write(&root).unwrap();
        record.member_of = sandbox.sandboxer;
        assert_eq!(record.status(&root), Status::Running);
        record.member_of = Some(ProcessRef {
            start_time: 1,
            ..record.creator
        });
        assert_eq!(record.status(&root), Status::Stopped);
    }

    #[test]
    fn another_schema_and_junk_are_refused_with_the_way_out() {
        let (_dir, root) = root();
        let path = root.container("c1").join(FILE);
        crate::root::create_private_dir(&root.container("c1")).unwrap();
        for junk in ["{\"schema\": 99}", "{\"schema\": 1}", "junk", ""] {
            fs::write(&path, junk).unwrap();
            let message = ContainerRecord::read(&root, "c1").unwrap_err().to_string();
            assert!(message.contains("delete --force"), "{message}");
        }
    }
}
