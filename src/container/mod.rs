//! OCI containers on the host: bundle, record, life.
//!
//! [`create`], [`start`], [`exec`], [`ps`], [`kill`], [`delete`], [`pause`],
//! [`update`] and [`events`] are what the commands of the same names do; [`state`]
//! is what is on disk and what follows from it.

pub mod bundle;
pub mod cgroup;
pub mod console;
pub mod create;
pub mod delete;
mod devices;
pub mod events;
pub mod exec;
pub mod execs;
#[cfg(any(test, fuzzing))]
#[allow(clippy::expect_used, reason = "a fuzz target fails by panicking")]
pub mod fuzzing;
pub mod guest_spec;
pub mod guest_volumes;
pub mod hooks;
mod host_mounts;
pub mod kill;
pub mod labels;
pub mod limits;
pub mod membership;
pub mod mount_options;
pub mod net_devices;
pub mod network;
pub mod pause;
pub mod pod;
mod preserved;
pub mod ps;
pub mod resources;
pub mod run;
mod seccomp;
mod served_cards;
mod shared_memory;
pub mod signal;
pub mod size;
pub mod start;
pub mod state;
pub mod stats;
pub mod terminal;
pub mod update;
mod validate;
mod volume_name;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kuasar_runv_protocol::words::words;

use crate::root::Root;
use crate::sys::lock::DirLock;

/// How long a command waits for another one that works on the same container.
const LOCK_DEADLINE: Duration = Duration::from_secs(60);

/// Errors of everything that is done to a container. Where clients match on the
/// text it is runc's.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("container does not exist")]
    NotFound,
    #[error("container with given ID already exists")]
    Exists,
    #[error("container id cannot be empty")]
    EmptyId,
    #[error("invalid container ID format")]
    InvalidId,
    #[error("container not running")]
    NotRunning,
    #[error("cannot start an already running container")]
    AlreadyRunning,
    #[error("cannot start a container that has stopped")]
    HasStopped,
    #[error("cannot start a container that is still being created")]
    StillCreating,
    #[error("cannot exec in a stopped container")]
    ExecStopped,
    #[error("cannot exec in a paused container (use --ignore-paused to override)")]
    ExecPaused,
    #[error("cannot exec in a container that is still being created")]
    ExecCreating,
    #[error(transparent)]
    ExecProcess(#[from] exec::process::Error),
    #[error(transparent)]
    Ps(#[from] ps::Error),
    #[error("cannot start a container in the paused state")]
    StartPaused,
    #[error("container not paused")]
    NotPaused,
    #[error("container with id {0} is not running")]
    NoEvents(String),
    #[error(transparent)]
    UnknownSignal(#[from] signal::UnknownSignal),
    #[error("unable to signal init: invalid argument")]
    InvalidSignal,
    #[error(transparent)]
    Limit(#[from] limits::Error),
    #[error(transparent)]
    Size(#[from] crate::sandbox::size::Error),
    #[error("the memory limit {limit} is below what the container uses ({usage})")]
    UsageAboveLimit { limit: i64, usage: u64 },
    #[error(
        "a container in a virtual machine cannot be {0}: this version of kuasar-runv does not support checkpoints"
    )]
    Checkpoint(&'static str),
    #[error("cannot delete container {id} that is not stopped: {status}")]
    NotStopped { id: String, status: state::Status },
    #[error("another command is working on the container; try again when it has ended")]
    Busy,
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    #[error(transparent)]
    GuestSpec(#[from] guest_spec::Error),
    #[error("unable to start container process: error during container init: {0}")]
    Seccomp(#[from] seccomp::Error),
    #[error(transparent)]
    ServedCard(#[from] served_cards::Error),
    #[error(transparent)]
    Membership(#[from] membership::Error),
    #[error(transparent)]
    Config(#[from] crate::config::Error),
    #[error(transparent)]
    Sandbox(#[from] crate::sandbox::Error),
    #[error(transparent)]
    NetDevice(#[from] net_devices::Error),
    #[error(transparent)]
    StandIn(crate::standin::spawn::Error),
    /// A hook of the container's set-up.
    #[error("unable to start container process: error during container init: {0}")]
    InitHook(String),
    /// A hook that runs later.
    #[error(transparent)]
    Hook(hooks::Error),
    /// The agent's words.
    #[error("{0}")]
    Process(String),
    #[error(transparent)]
    Agent(crate::agent_client::Error),
    #[error("unit {unit} of systemd: {step}: {source}")]
    Systemd {
        unit: String,
        step: &'static str,
        source: io::Error,
    },
    #[error("the volume {}: {source}", path.display())]
    Volume {
        path: PathBuf,
        source: Box<crate::sandbox::Error>,
    },
    #[error("cgroup {}: {source}", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("dial unix {}: connect: {}", path.display(), words(source))]
    ConsoleSocket { path: PathBuf, source: io::Error },
    #[error("open {}: {}", path.display(), words(source))]
    PidFile { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Preserved(#[from] preserved::Error),
    #[error("interrupted")]
    Interrupted,
    #[error("{0}")]
    Unsupported(String),
    #[error("{context}: {source}")]
    Io { context: String, source: io::Error },
    #[error(transparent)]
    Record(state::RecordError),
}

impl From<state::RecordError> for Error {
    fn from(error: state::RecordError) -> Error {
        match error {
            state::RecordError::NotFound => Error::NotFound,
            other => Error::Record(other),
        }
    }
}

impl From<crate::standin::spawn::Error> for Error {
    fn from(error: crate::standin::spawn::Error) -> Error {
        use crate::standin::spawn;
        match error {
            spawn::Error::InRootfs(said) => Error::InitHook(said),
            spawn::Error::Interrupted => Error::Interrupted,
            other => Error::StandIn(other),
        }
    }
}

/// Adds what was being done to an I/O error.
fn context(context: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io {
        context: context.into(),
        source,
    }
}

/// Takes the lock of an existing container.
fn lock(root: &Root, id: &str) -> Result<DirLock, Error> {
    check_id(id)?;
    DirLock::acquire(&root.container(id), LOCK_DEADLINE).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::NotFound,
        io::ErrorKind::TimedOut => Error::Busy,
        _ => context("locking the container")(e),
    })
}

/// Container ids become file names: runc's alphabet, and not `.` or `..`.
///
/// # Errors
/// [`Error::EmptyId`], [`Error::InvalidId`].
pub fn check_id(id: &str) -> Result<(), Error> {
    if id.is_empty() {
        return Err(Error::EmptyId);
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    let fits = id.len() <= kuasar_runv_protocol::stream::MAX_ID_LEN;
    if id == "." || id == ".." || !fits || !id.chars().all(allowed) {
        return Err(Error::InvalidId);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_runcs() {
        for good in ["a", "A_b+c-d.e", "0123456789abcdef", "..."] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        assert!(matches!(check_id(""), Err(Error::EmptyId)));
        for bad in [
            ".",
            "..",
            "a/b",
            "../x",
            "a b",
            "é",
            "a\n",
            &"x".repeat(256),
        ] {
            assert!(matches!(check_id(bad), Err(Error::InvalidId)), "{bad:?}");
        }
    }
}
