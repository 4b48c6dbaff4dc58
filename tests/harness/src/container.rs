//! A container that `create` made, deleted at the latest when it is dropped.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use serde_json::Value;

use crate::invocation::{Invocation, Output};
use crate::wait::{CALL, SHORT, wait_until};
use crate::{Bundle, World, reaper};

/// A created container; its output goes to files, its pid is a child of the test.
pub struct Container<'w> {
    world: &'w World,
    name: String,
    pub id: String,
    /// From the pid file.
    pub pid: i32,
}

impl<'w> Container<'w> {
    /// # Panics
    /// When `create` fails or writes no pid.
    #[must_use]
    pub fn create(world: &'w World, bundle: &Bundle, name: &str) -> Container<'w> {
        let stdout = world.output_file(&format!("{name}.stdout"));
        let stderr = world.output_file(&format!("{name}.stderr"));
        let call = world.create_call(bundle.path(), name);
        let out = call.output_to(stdout, stderr).output();
        let said = fs::read_to_string(world.path(&format!("{name}.stderr"))).unwrap_or_default();
        assert_eq!(out.code(), 0, "create: {said}");
        Container::adopt(world, name)
    }

    /// A container the test created by a call of its own with the same name.
    ///
    /// # Panics
    /// When there is no pid in the pid file.
    #[must_use]
    pub fn adopt(world: &'w World, name: &str) -> Container<'w> {
        let pid = fs::read_to_string(world.pid_file(name)).expect("pid file");
        Container {
            pid: pid
                .parse()
                .unwrap_or_else(|_| panic!("pid file has {pid:?}")),
            id: world.id(name),
            name: name.into(),
            world,
        }
    }

    #[must_use]
    pub fn world(&self) -> &'w World {
        self.world
    }

    /// A call with the container's id as last argument.
    #[must_use]
    pub fn command(&self, words: &[&str]) -> Output {
        self.world.call(words).arg(&self.id).output()
    }

    /// `exec` with these flags, not yet started.
    #[must_use]
    pub fn exec_call<F: AsRef<OsStr>, C: AsRef<OsStr>>(
        &self,
        flags: impl IntoIterator<Item = F>,
        command: impl IntoIterator<Item = C>,
    ) -> Invocation {
        let call = self.world.call(["exec"]).args(flags);
        call.arg(&self.id).args(command)
    }

    /// `exec` of a shell script, to its end.
    #[must_use]
    pub fn exec_sh(&self, flags: &[&str], script: &str) -> Output {
        self.exec_call(flags, ["/bin/sh", "-c", script]).output()
    }

    /// A detached `exec` of a shell script; its pid is a child of the test.
    ///
    /// # Panics
    /// When it fails or writes no pid.
    #[must_use]
    pub fn exec_detached(&self, script: &str, name: &str) -> i32 {
        let files = [".stdout", ".stderr"].map(|f| self.world.output_file(&format!("{name}{f}")));
        let pid_file = self.world.pid_file(name);
        let flags = [
            OsStr::new("--detach"),
            "--pid-file".as_ref(),
            pid_file.as_ref(),
        ];
        let [stdout, stderr] = files;
        let call = self.exec_call(flags, ["/bin/sh", "-c", script]);
        let _ = call.output_to(stdout, stderr).output().ok();
        let pid = fs::read_to_string(&pid_file).expect("pid file");
        pid.parse()
            .unwrap_or_else(|_| panic!("pid file has {pid:?}"))
    }

    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn start(&self) {
        let _ = self.command(&["start"]).ok();
    }

    /// `kill <id> <signal>`.
    #[must_use]
    pub fn kill(&self, signal: &str) -> Output {
        self.world.call(["kill", &self.id, signal]).output()
    }

    #[must_use]
    pub fn delete(&self) -> Output {
        self.command(&["delete"])
    }

    #[must_use]
    pub fn delete_force(&self) -> Output {
        self.command(&["delete", "--force"])
    }

    /// The JSON `state` prints.
    ///
    /// # Panics
    /// When `state` fails or prints something else.
    #[track_caller]
    #[must_use]
    pub fn state(&self) -> Value {
        let out = self.command(&["state"]).ok();
        serde_json::from_slice(&out.stdout).expect("state prints JSON")
    }

    #[track_caller]
    #[must_use]
    pub fn status(&self) -> String {
        self.state()["status"].as_str().expect("status").to_owned()
    }

    /// Waits for the process of the pid file, which this process has adopted.
    ///
    /// # Panics
    /// When it still runs at the deadline.
    #[track_caller]
    pub fn wait(&self) -> ExitStatus {
        self.wait_within(CALL)
    }

    /// # Panics
    /// When it still runs at the deadline.
    #[track_caller]
    pub fn wait_within(&self, deadline: Duration) -> ExitStatus {
        reaper::wait(self.pid, deadline)
            .unwrap_or_else(|| panic!("pid {} still runs after {deadline:?}", self.pid))
    }

    /// Waits, and shows the status as a shell does: 128 + n for a signal.
    #[track_caller]
    pub fn exit_code(&self) -> i32 {
        let status = self.wait();
        status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
    }

    #[must_use]
    pub fn stdout_file(&self) -> PathBuf {
        self.world.path(&format!("{}.stdout", self.name))
    }

    /// What the container has written to stdout so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.stdout_file()).unwrap_or_default()).into_owned()
    }

    #[must_use]
    pub fn stderr(&self) -> String {
        let path = self.world.path(&format!("{}.stderr", self.name));
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    /// Waits until the container has written this to stdout.
    #[track_caller]
    pub fn wait_for_output(&self, words: &str) {
        wait_until(&format!("output {words:?}"), SHORT, || {
            self.stdout().contains(words)
        });
    }

    /// Waits until `state` shows this status.
    #[track_caller]
    pub fn wait_for_status(&self, status: &str) {
        wait_until(&format!("status {status}"), SHORT, || {
            self.status() == status
        });
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // After an explicit delete this does nothing and succeeds; after a failure
        // the world's leak check reports what is left.
        let call = self.world.call(["delete", "--force", &self.id]);
        let mut running = call.deadline(SHORT).spawn();
        if reaper::wait(running.pid, SHORT).is_none() {
            running.kill();
        }
    }
}
