//! The `startContainer` hooks: run by the container's own process, as its user
//! and in its root, between `start` and the program.
//!
//! Not left to libcontainer, whose state for them names paths of the guest and
//! which waits for a timeout in a thread, in a process that was cloned without exec.

use std::io;
use std::time::Duration;

use kuasar_runv_protocol::BUNDLE_ANNOTATION;
use kuasar_runv_protocol::hook::{self, Hook};
use oci_spec::runtime::{self, ContainerState, Spec, State, StateBuilder};

use super::failure::Failure;

/// The hooks of one container and what they are told.
#[derive(Clone)]
pub struct StartHooks {
    hooks: Vec<runtime::Hook>,
    state: State,
}

impl StartHooks {
    /// Takes the hooks out of the spec, and the bundle's path out of its annotations.
    pub fn take(spec: &mut Spec, container_id: &str) -> Result<Option<StartHooks>, Failure> {
        let hooks = spec
            .hooks_mut()
            .take()
            .and_then(|hooks| hooks.start_container().clone())
            .unwrap_or_default();
        if hooks.is_empty() {
            return Ok(None);
        }
        let mut annotations = spec.annotations_mut().take().unwrap_or_default();
        let bundle = annotations.remove(BUNDLE_ANNOTATION).unwrap_or_default();
        let mut state = StateBuilder::default()
            .version(spec.version().clone())
            .id(container_id)
            .status(ContainerState::Created)
            .bundle(bundle);
        if !annotations.is_empty() {
            state = state.annotations(annotations);
        }
        let state = state
            .build()
            .map_err(|e| Failure::invalid(format!("the state of startContainer hooks: {e}")))?;
        Ok(Some(StartHooks { hooks, state }))
    }

    /// Runs them; a hook without an environment of its own has the process's.
    ///
    /// # Errors
    /// runc's words about the first that fails.
    pub fn run(&self, env: &[String]) -> Result<(), String> {
        for (index, each) in self.hooks.iter().enumerate() {
            let hook = Hook {
                path: each.path(),
                args: each.args().as_deref().unwrap_or_default(),
                env: each.env().as_deref().unwrap_or(env),
                timeout: each
                    .timeout()
                    .map(|seconds| Duration::from_secs(seconds.unsigned_abs())),
                dir: None,
            };
            self.state()
                .map_err(hook::Error::Io)
                .and_then(|state| hook::run(&hook, &state, None))
                .map_err(|e| format!("error running hook #{index}: {e}"))?;
        }
        Ok(())
    }

    /// The pid is the one the container sees, as runc has it.
    fn state(&self) -> io::Result<Vec<u8>> {
        let mut state = self.state.clone();
        state.set_pid(Some(nix::unistd::getpid().as_raw()));
        Ok(serde_json::to_vec(&state)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(hooks: Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "root": {"path": "/"},
            "hooks": hooks,
            "annotations": {"a": "b", BUNDLE_ANNOTATION: "/the/bundle"},
        }))
        .unwrap()
    }

    #[test]
    fn the_state_names_the_bundle_of_the_host() {
        let mut spec = spec(json!({"startContainer": [{"path": "/bin/true"}]}));
        let hooks = StartHooks::take(&mut spec, "c1").unwrap().unwrap();
        assert!(spec.hooks().is_none() && spec.annotations().is_none());
        let state: Value = serde_json::from_slice(&hooks.state().unwrap()).unwrap();
        assert_eq!(state["bundle"], "/the/bundle");
        assert_eq!(state["status"], "created");
        assert_eq!(state["annotations"], json!({"a": "b"}));
        assert_eq!(state["pid"], std::process::id());
        hooks.run(&[]).unwrap();
    }

    #[test]
    fn a_hook_without_an_environment_has_the_processes() {
        let test = json!({"path": "/bin/sh", "args": ["sh", "-c", "[ \"$A\" = 1 ]"]});
        let mut spec = spec(json!({"startContainer": [test]}));
        let hooks = StartHooks::take(&mut spec, "c1").unwrap().unwrap();
        hooks.run(&["A=1".to_owned()]).unwrap();
        let message = hooks.run(&[]).unwrap_err();
        assert!(message.starts_with("error running hook #0: error running hook: exit status 1"));
    }

    #[test]
    fn no_hooks_cost_nothing() {
        assert!(
            StartHooks::take(&mut spec(json!({})), "c1")
                .unwrap()
                .is_none()
        );
    }
}
