//! The hooks of config.json that run on the host, and the state they get.
//!
//! | hook | run by | when | where |
//! |---|---|---|---|
//! | `prestart`, `createRuntime` | `create` | the stand-in has its namespaces, nothing exists in the guest | host |
//! | `createContainer` | the stand-in | behind them, before it leaves the host's root | the stand-in's namespaces, in the rootfs |
//! | `startContainer` | the guest's agent | `start`, before the program | the container |
//! | `poststart` | `start` | the program runs | host |
//! | `poststop` | `delete`, or a `create` that failed | everything but the record is gone | host |
//!
//! The first failing hook ends the list. `state.pid` is the stand-in's pid.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use kuasar_runv_protocol::hook;
use oci_spec::runtime::{Hook, Spec};
use serde::{Deserialize, Serialize};

use super::state::{ContainerRecord, Status};

/// A hook failed. The words are runc's.
#[derive(Debug, thiserror::Error)]
#[error("error running hook #{index}: {source}")]
pub struct Error {
    /// Position in its list.
    pub index: usize,
    pub source: hook::Error,
}

/// The hooks of a container.
#[derive(Clone, Debug, Default)]
pub struct Hooks {
    pub prestart: Vec<Hook>,
    pub create_runtime: Vec<Hook>,
    pub create_container: Vec<Hook>,
    pub late: LateHooks,
}

/// Those that run when the bundle may be gone: part of the record.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LateHooks {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub poststart: Vec<Hook>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub poststop: Vec<Hook>,
}

impl LateHooks {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.poststart.is_empty() && self.poststop.is_empty()
    }
}

impl Hooks {
    /// The host's hooks of a bundle.
    #[must_use]
    pub fn of(spec: &Spec) -> Hooks {
        let Some(hooks) = spec.hooks() else {
            return Hooks::default();
        };
        let list = |hooks: &Option<Vec<Hook>>| hooks.clone().unwrap_or_default();
        // Deprecated since 1.0.2 and still what docker uses.
        #[allow(deprecated)]
        let prestart = list(hooks.prestart());
        Hooks {
            prestart,
            create_runtime: list(hooks.create_runtime()),
            create_container: list(hooks.create_container()),
            late: LateHooks {
                poststart: list(hooks.poststart()),
                poststop: list(hooks.poststop()),
            },
        }
    }

    /// Whether any run before the guest gets to know of the container.
    #[must_use]
    pub fn run_before_guest(&self) -> bool {
        let lists = [&self.prestart, &self.create_runtime, &self.create_container];
        lists.iter().any(|list| !list.is_empty())
    }

    /// How long the stand-in's hooks may take; `None`: as long as they like.
    #[must_use]
    pub fn create_container_time(&self) -> Option<Duration> {
        self.create_container.iter().map(timeout).sum()
    }
}

/// The state of the container as in the runtime specification, in runc's order.
#[derive(Serialize)]
pub struct State<'a> {
    #[serde(rename = "ociVersion")]
    oci_version: &'a str,
    id: &'a str,
    status: String,
    /// 0: there is no process.
    #[serde(skip_serializing_if = "is_zero")]
    pid: i32,
    bundle: &'a Path,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // what serde calls
fn is_zero(pid: &i32) -> bool {
    *pid == 0
}

impl<'a> State<'a> {
    /// What hooks are told of a container that is in `status`.
    #[must_use]
    pub fn of(record: &'a ContainerRecord, status: Status) -> State<'a> {
        let standin = record.standin.filter(|_| status != Status::Stopped);
        State {
            oci_version: &record.oci_version,
            id: &record.id,
            status: status.to_string(),
            pid: standin.map_or(0, |process| process.pid),
            bundle: &record.bundle,
            annotations: &record.annotations,
        }
    }

    /// The same, said by a stand-in that is not on record yet.
    #[must_use]
    pub fn with_pid(self, pid: i32) -> State<'a> {
        State { pid, ..self }
    }
}

fn timeout(hook: &Hook) -> Option<Duration> {
    hook.timeout()
        .map(|seconds| Duration::from_secs(seconds.unsigned_abs()))
}

/// Runs hooks one after the other, in `dir` or else in the caller's working
/// directory. `stop` ends the one that runs when it becomes readable or hangs up.
///
/// # Errors
/// Of the first that fails.
pub fn run(
    list: &[Hook],
    state: &State<'_>,
    dir: Option<&Path>,
    stop: Option<BorrowedFd<'_>>,
) -> Result<(), Error> {
    if list.is_empty() {
        return Ok(());
    }
    let failed = |index| move |source| Error { index, source };
    let json = serde_json::to_vec(state)
        .map_err(|e| hook::Error::Io(e.into()))
        .map_err(failed(0))?;
    for (index, each) in list.iter().enumerate() {
        let hook = hook::Hook {
            path: each.path(),
            args: each.args().as_deref().unwrap_or_default(),
            env: each.env().as_deref().unwrap_or_default(),
            timeout: timeout(each),
            dir,
        };
        hook::run(&hook, &json, stop).map_err(failed(index))?;
    }
    Ok(())
}

/// Runs hooks whose failure changes nothing any more: all of them, with a
/// warning for each that fails.
pub fn run_all(list: &[Hook], state: &State<'_>) {
    for (index, each) in list.iter().enumerate() {
        if let Err(e) = run(std::slice::from_ref(each), state, None, None) {
            log::warn!("{}", Error { index, ..e });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record() -> ContainerRecord {
        let mut record = ContainerRecord::new("c1", "c1", Path::new("/b")).unwrap();
        "1.2.0".clone_into(&mut record.oci_version);
        record.standin = Some(record.creator);
        record
    }

    fn hooks(list: serde_json::Value) -> Vec<Hook> {
        serde_json::from_value(list).unwrap()
    }

    #[test]
    fn the_state_is_runcs_and_has_no_pid_when_stopped() {
        let record = record();
        let creating = serde_json::to_string(&State::of(&record, Status::Creating)).unwrap();
        let pid = record.creator.pid;
        assert_eq!(
            creating,
            format!(
                r#"{{"ociVersion":"1.2.0","id":"c1","status":"creating","pid":{pid},"bundle":"/b"}}"#
            )
        );
        let stopped = serde_json::to_value(State::of(&record, Status::Stopped)).unwrap();
        assert_eq!(
            stopped,
            json!({"ociVersion": "1.2.0", "id": "c1", "status": "stopped", "bundle": "/b"})
        );
    }

    #[test]
    fn the_first_failure_ends_the_list_and_is_numbered() {
        let dir = tempfile::tempdir().unwrap();
        let mark = |name: &str| json!({"path": "/usr/bin/touch", "args": ["touch", dir.path().join(name)]});
        let list = hooks(json!([mark("0"), {"path": "/bin/false"}, mark("2")]));
        let record = record();
        let state = State::of(&record, Status::Creating);
        let message = run(&list, &state, None, None).unwrap_err().to_string();
        assert_eq!(
            message,
            "error running hook #1: error running hook: exit status 1, stdout: , stderr: "
        );
        assert!(dir.path().join("0").exists() && !dir.path().join("2").exists());
        run_all(&list, &state);
        assert!(dir.path().join("2").exists());
    }

    #[test]
    fn the_time_of_hooks_is_unbounded_when_one_is() {
        let list = |json| Hooks {
            create_container: hooks(json),
            ..Hooks::default()
        };
        let bounded = list(json!([{"path": "/a", "timeout": 2}, {"path": "/b", "timeout": 3}]));
        assert_eq!(
            bounded.create_container_time(),
            Some(Duration::from_secs(5))
        );
        let unbounded = list(json!([{"path": "/a", "timeout": 2}, {"path": "/b"}]));
        assert_eq!(unbounded.create_container_time(), None);
    }
}
