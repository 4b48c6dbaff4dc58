//! One call of the runtime: arguments in, status and output out, never later than
//! its deadline.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::wait::CALL;
use crate::{process, reaper};

/// Most output of one call a test keeps, in bytes.
const OUTPUT_LIMIT: u64 = 64 << 20;

enum Input {
    Null,
    Bytes(Vec<u8>),
    /// The test writes itself, through [`Running::stdin`].
    Pipe,
}

enum Sink {
    Collect,
    /// The test reads itself, through [`Running::stdout`].
    Pipe,
    File(File),
}

/// A call that is being put together.
pub struct Invocation {
    command: Command,
    input: Input,
    stdout: Sink,
    stderr: Sink,
    deadline: Duration,
}

impl Invocation {
    #[must_use]
    pub fn new(binary: &Path) -> Invocation {
        let mut command = Command::new(binary);
        command.env_clear();
        Invocation {
            command,
            input: Input::Null,
            stdout: Sink::Collect,
            stderr: Sink::Collect,
            deadline: CALL,
        }
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    #[must_use]
    pub fn env_remove(mut self, key: impl AsRef<OsStr>) -> Self {
        self.command.env_remove(key);
        self
    }

    #[must_use]
    pub fn current_dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    #[must_use]
    pub fn stdin_bytes(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self
    }

    #[must_use]
    pub fn stdin_pipe(mut self) -> Self {
        self.input = Input::Pipe;
        self
    }

    #[must_use]
    pub fn stdout_pipe(mut self) -> Self {
        self.stdout = Sink::Pipe;
        self
    }

    /// Output that outlives the call goes to files: a pipe would not reach its end
    /// before the container does.
    #[must_use]
    pub fn output_to(mut self, stdout: File, stderr: File) -> Self {
        self.stdout = Sink::File(stdout);
        self.stderr = Sink::File(stderr);
        self
    }

    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Gives the call these descriptors at the numbers from 3 on.
    #[must_use]
    pub fn descriptors(mut self, descriptors: impl IntoIterator<Item = OwnedFd>) -> Self {
        // Far from both: where they are, and where they go.
        const ASIDE: i32 = 300;
        let descriptors: Vec<_> = descriptors.into_iter().collect();
        // SAFETY: the closure makes system calls and nothing else.
        unsafe {
            self.command.pre_exec(move || {
                for (fd, place) in descriptors.iter().zip(ASIDE..) {
                    if libc::dup2(fd.as_raw_fd(), place) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                for (aside, place) in (ASIDE..).zip(3..3 + descriptors.len() as i32) {
                    if libc::dup2(aside, place) < 0 || libc::close(aside) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        self
    }

    /// The program and its arguments.
    #[must_use]
    pub fn words(&self) -> Vec<OsString> {
        let mut words = vec![self.command.get_program().to_owned()];
        words.extend(self.command.get_args().map(OsStr::to_owned));
        words
    }

    /// The same call, with its environment, of another program without arguments.
    #[must_use]
    pub fn replaced_by(mut self, program: &Path) -> Self {
        let mut command = Command::new(program);
        command.env_clear();
        command.envs(
            self.command
                .get_envs()
                .filter_map(|(key, value)| Some((key, value?))),
        );
        self.command = command;
        self
    }

    /// For what this builder does not cover (`pre_exec`).
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts the call.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn spawn(mut self) -> Running {
        let name = describe(&self.command);
        self.command.stdin(match self.input {
            Input::Null => Stdio::null(),
            Input::Bytes(_) | Input::Pipe => Stdio::piped(),
        });
        let keep_stdout = matches!(self.stdout, Sink::Pipe);
        let stdio = |sink| match sink {
            Sink::Collect | Sink::Pipe => Stdio::piped(),
            Sink::File(file) => Stdio::from(file),
        };
        self.command.stdout(stdio(self.stdout));
        self.command.stderr(stdio(self.stderr));
        let started = Instant::now();
        let mut child = reaper::spawn(&mut self.command).unwrap_or_else(|e| panic!("{name}: {e}"));
        // The descriptors of files given to the child would keep them open here.
        drop(self.command);
        let mut stdin = child.stdin.take();
        if let Input::Bytes(bytes) = self.input
            && let Some(mut pipe) = stdin.take()
        {
            // The process may end without reading everything: not this test's error.
            thread::spawn(move || drop(pipe.write_all(&bytes)));
        }
        let (stdout, collected_stdout) = match child.stdout.take() {
            Some(pipe) if keep_stdout => (Some(pipe), None),
            Some(pipe) => (None, Some(collect(pipe))),
            None => (None, None),
        };
        Running {
            pid: child.pid,
            collected_stdout,
            collected_stderr: child.stderr.take().map(collect),
            stdout,
            stdin,
            name,
            started,
            deadline: self.deadline,
            finished: false,
        }
    }

    /// Runs the call to its end.
    ///
    /// # Panics
    /// When it takes longer than the deadline or leaves its output open.
    #[must_use]
    pub fn output(self) -> Output {
        self.spawn().wait()
    }
}

fn collect(reader: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is what the test compares.
        let _ = reader.take(OUTPUT_LIMIT).read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    receiver
}

fn describe(command: &Command) -> String {
    let mut words: Vec<OsString> = vec![command.get_program().to_owned()];
    words.extend(command.get_args().map(OsStr::to_owned));
    let words: Vec<_> = words.iter().map(|w| w.to_string_lossy()).collect();
    words.join(" ")
}

/// A call that has been started. Killed when it is dropped before its end.
pub struct Running {
    pub pid: i32,
    pub stdin: Option<ChildStdin>,
    pub stdout: Option<ChildStdout>,
    collected_stdout: Option<Receiver<Vec<u8>>>,
    collected_stderr: Option<Receiver<Vec<u8>>>,
    name: String,
    started: Instant,
    deadline: Duration,
    finished: bool,
}

impl Running {
    /// Waits for the end of the process and of its output.
    ///
    /// # Panics
    /// When either is not reached before the deadline.
    #[must_use]
    pub fn wait(mut self) -> Output {
        drop(self.stdin.take());
        let left = self.deadline.saturating_sub(self.started.elapsed());
        let Some(status) = reaper::wait(self.pid, left) else {
            self.kill();
            let stderr = receive(self.collected_stderr.take(), Duration::from_secs(1));
            panic!(
                "{} still ran after {:?}; stderr: {}",
                self.name,
                self.deadline,
                text(&stderr.unwrap_or_default())
            );
        };
        self.finished = true;
        let elapsed = self.started.elapsed();
        let left = self.deadline.saturating_sub(elapsed);
        let end_of = |stream: Option<Receiver<Vec<u8>>>, what| {
            receive(stream, left).unwrap_or_else(|| {
                panic!("{} ended but something keeps its {what} open", self.name)
            })
        };
        let stdout = end_of(self.collected_stdout.take(), "stdout");
        let stderr = end_of(self.collected_stderr.take(), "stderr");
        Output {
            status,
            stdout,
            stderr,
            elapsed,
            name: self.name.clone(),
        }
    }

    /// Ends the process the hard way.
    pub fn kill(&mut self) {
        if !self.finished && reaper::wait(self.pid, Duration::ZERO).is_none() {
            // It may have ended just now.
            let _ = process::signal(self.pid, libc::SIGKILL);
        }
        self.finished = true;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn receive(stream: Option<Receiver<Vec<u8>>>, deadline: Duration) -> Option<Vec<u8>> {
    match stream {
        None => Some(Vec::new()),
        Some(receiver) => receiver.recv_timeout(deadline).ok(),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a call returned.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub elapsed: Duration,
    name: String,
}

impl Output {
    #[must_use]
    pub fn stdout(&self) -> String {
        text(&self.stdout)
    }

    #[must_use]
    pub fn stderr(&self) -> String {
        text(&self.stderr)
    }

    /// Exit code as a shell shows it: 128 + n for a signal.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or_default())
    }

    /// # Panics
    /// When the call failed.
    #[track_caller]
    pub fn ok(self) -> Output {
        self.exits_with(0)
    }

    /// # Panics
    /// When the call returned another code.
    #[track_caller]
    pub fn exits_with(self, code: i32) -> Output {
        assert_eq!(
            self.code(),
            code,
            "exit code of `{}`\n--- stdout\n{}\n--- stderr\n{}",
            self.name,
            self.stdout(),
            self.stderr()
        );
        self
    }

    /// Asserts a failure with this exit code that says `words` on stderr.
    ///
    /// # Panics
    /// When it is another code or other words.
    #[track_caller]
    pub fn fails_with(self, code: i32, words: &str) -> Output {
        let out = self.exits_with(code);
        // The text format quotes the message.
        let said = out.stderr().replace('\\', "");
        assert!(
            said.contains(words),
            "`{}` should say {words:?} and says {said:?}",
            out.name
        );
        out
    }

    /// As [`Output::fails_with`], for words no client compares: upper and lower case
    /// are the same.
    ///
    /// # Panics
    /// When it is another code or other words.
    #[track_caller]
    pub fn fails_about(self, code: i32, words: &str) -> Output {
        let out = self.exits_with(code);
        let said = out.stderr().to_lowercase();
        assert!(
            said.contains(&words.to_lowercase()),
            "`{}` should say {words:?} and says {said:?}",
            out.name
        );
        out
    }

    /// Value of the line `key=value` a script in the container printed.
    ///
    /// # Panics
    /// When there is no such line.
    #[track_caller]
    #[must_use]
    pub fn fact(&self, key: &str) -> String {
        let stdout = self.stdout();
        stdout
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .unwrap_or_else(|| {
                panic!(
                    "no line {key}=... from the container\n--- stdout\n{stdout}\n--- stderr\n{}",
                    self.stderr()
                )
            })
            .to_owned()
    }
}
