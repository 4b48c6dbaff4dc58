//! What libcontainer calls in the finished container: look the program up before
//! `create` returns, execute it on `start`.
//!
//! Both run as the container's user, in its root, with its capabilities.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use kuasar_runv_protocol::words::words;
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use oci_spec::runtime::{PosixRlimit, Spec};

use super::failure::record_final;
use super::hooks::StartHooks;
use super::lookup::look_path;
use super::passwd::home_of;
use super::rlimits;
use super::seccomp::Confinement;

/// Exit code of a process whose program could not be executed (runc 1.1).
const EXEC_FAILED: i32 = 1;

/// The program and its environment.
#[derive(Clone)]
pub struct Program {
    /// `NAME=value`, as execve gets it.
    env: Vec<String>,
    /// HOME has to be looked up in the container.
    home_missing: bool,
    /// A working directory that can only be made in the finished container.
    late_cwd: Option<PathBuf>,
    hooks: Option<StartHooks>,
    limits: Vec<PosixRlimit>,
    confinement: Option<Confinement>,
    /// Path found by `validate`.
    found: RefCell<Option<String>>,
}

impl Program {
    /// `env` in the order of the spec; of a name that comes twice the last value
    /// counts.
    pub fn new(env: &[String], late_cwd: Option<PathBuf>) -> Program {
        let mut unique: Vec<String> = Vec::with_capacity(env.len() + 1);
        for entry in env {
            let name = name_of(entry);
            match unique.iter_mut().find(|e| name_of(e) == name) {
                Some(earlier) => earlier.clone_from(entry),
                None => unique.push(entry.clone()),
            }
        }
        let home_missing = !unique
            .iter()
            .any(|e| e.strip_prefix("HOME=").is_some_and(|home| !home.is_empty()));
        if home_missing {
            unique.retain(|e| name_of(e) != "HOME");
        }
        Program {
            env: unique,
            home_missing,
            late_cwd,
            hooks: None,
            limits: Vec::new(),
            confinement: None,
            found: RefCell::new(None),
        }
    }

    /// Runs hooks before the program.
    pub fn with_hooks(self, hooks: Option<StartHooks>) -> Program {
        Program { hooks, ..self }
    }

    /// Sets resource limits before the program.
    pub fn with_limits(self, limits: &[PosixRlimit]) -> Program {
        Program {
            limits: limits.to_vec(),
            ..self
        }
    }

    /// Confines itself before the program is looked up.
    pub fn with_confinement(self, confinement: Option<Confinement>) -> Program {
        Program {
            confinement,
            ..self
        }
    }

    fn variable(&self, name: &str) -> &str {
        self.env
            .iter()
            .find(|e| name_of(e) == name)
            .map_or("", |e| &e[name.len() + 1..])
    }

    fn enter_late_cwd(&self) -> Result<(), String> {
        let Some(cwd) = &self.late_cwd else {
            return Ok(());
        };
        let failed = |what: &str, e: &io::Error| {
            format!(
                "error during container init: {what} {}: {}",
                cwd.display(),
                words(e)
            )
        };
        fs::create_dir_all(cwd).map_err(|e| failed("mkdir", &e))?;
        std::env::set_current_dir(cwd).map_err(|e| failed("chdir to cwd", &e))
    }

    /// Looks the program up, as the process that will execute it.
    ///
    /// # Errors
    /// runc's message.
    pub fn prepare(&self, args: &[String]) -> Result<(), String> {
        self.enter_late_cwd()?;
        let name = args.first().ok_or("args must not be empty")?;
        let found = look_path(name, self.variable("PATH"))?;
        *self.found.borrow_mut() = Some(found);
        Ok(())
    }

    /// The environment with the variables that only the container can tell.
    fn complete_env(&self, uid: u32) -> Vec<String> {
        let mut env = self.env.clone();
        if self.home_missing {
            env.push(format!("HOME={}", home_of(uid)));
        }
        env
    }

    /// Returns only when the program could not be executed.
    fn execute(&self, args: &[String], env: &[String]) -> io::Error {
        let Some(path) = self.found.borrow().clone() else {
            return io::Error::from_raw_os_error(libc::ENOENT);
        };
        let strings = |list: &[String]| -> Result<Vec<CString>, _> {
            list.iter().map(|s| CString::new(s.as_str())).collect()
        };
        let (Ok(path), Ok(args), Ok(env)) = (CString::new(path), strings(args), strings(env))
        else {
            return io::Error::from_raw_os_error(libc::EINVAL);
        };
        if let Err(e) = rlimits::apply(&self.limits) {
            return e;
        }
        match nix::unistd::execve(&path, &args, &env) {
            Ok(never) => match never {},
            Err(e) => e.into(),
        }
    }

    /// Becomes the program, after its hooks; what keeps it from that goes where
    /// runc says it, to the process's own stderr.
    pub fn become_program(&self, args: &[String], uid: u32) -> ! {
        let env = self.complete_env(uid);
        if let Some(Err(message)) = self.hooks.as_ref().map(|hooks| hooks.run(&env)) {
            drop(writeln!(io::stderr(), "{message}"));
            // SAFETY: as below.
            unsafe { libc::_exit(EXEC_FAILED) }
        }
        let error = self.execute(args, &env);
        let name = self.found.borrow().clone().unwrap_or_default();
        drop(writeln!(io::stderr(), "exec {name}: {}", words(&error)));
        // SAFETY: ends a process that has nothing left to do.
        unsafe { libc::_exit(EXEC_FAILED) }
    }
}

fn name_of(entry: &str) -> &str {
    entry.split('=').next().unwrap_or_default()
}

fn args(spec: &Spec) -> &[String] {
    spec.process()
        .as_ref()
        .and_then(|p| p.args().as_deref())
        .unwrap_or_default()
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let confined = match &self.confinement {
            Some(confinement) => confinement
                .apply()
                .map_err(|e| format!("error during container init: {e}")),
            None => Ok(()),
        };
        let prepared = confined.and_then(|()| self.prepare(args(spec)));
        prepared.map_err(|message| {
            record_final(&format!("unable to start container process: {message}"));
            ExecutorValidationError::ArgValidationError(message)
        })
    }

    /// The environment goes to `execve` directly: through a map it would lose
    /// its order.
    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let uid = spec.process().as_ref().map_or(0, |p| p.user().uid());
        self.become_program(args(spec), uid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(env: &[&str]) -> Program {
        Program::new(
            &env.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>(),
            None,
        )
    }

    #[test]
    fn the_last_value_of_a_variable_counts_at_the_place_of_the_first() {
        let program = program(&["A=1", "PATH=/bin", "A=2", "HOME=/h"]);
        assert_eq!(program.env, ["A=2", "PATH=/bin", "HOME=/h"]);
        assert_eq!(program.variable("PATH"), "/bin");
        assert_eq!(program.variable("NOPE"), "");
        assert!(!program.home_missing);
    }

    #[test]
    fn an_empty_home_is_a_missing_one() {
        let program = program(&["HOME=", "A=1"]);
        assert!(program.home_missing);
        assert_eq!(program.env, ["A=1"]);
    }
}
