//! Running one hook of config.json, the same way on the host and in the guest.
//!
//! A hook is a program that gets the container's state on its standard input
//! and has to succeed within its timeout. Rules and words are runc's:
//! `error running hook: exit status 1, stdout: ..., stderr: ...`. It inherits no
//! descriptor, no blocked signal, and only the environment it names.
//!
//! The caller may be a process that was cloned without exec and must stay
//! single-threaded, so one poll loop feeds, drains and watches the child. What
//! the hook leaves running in the background is not waited for.

use std::ffi::CStr;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::words::words;

/// Most that is kept of each output of a hook, in bytes; the rest is read and
/// dropped.
const MAX_OUTPUT: usize = 16 * 1024;
const BLOCK: usize = 4096;
/// Blocks that are read at a time, so that a hook that never stops talking does
/// not escape its timeout.
const MAX_BLOCKS: usize = 64;

/// A hook of config.json.
#[derive(Debug)]
pub struct Hook<'a> {
    /// Absolute.
    pub path: &'a Path,
    /// From `argv[0]` on; empty stands for the path alone.
    pub args: &'a [String],
    /// `NAME=value`; the hook has no other environment.
    pub env: &'a [String],
    pub timeout: Option<Duration>,
    /// Working directory; the caller's by default.
    pub dir: Option<&'a Path>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("fork/exec {}: {}", .path.display(), words(.source))]
    Start { path: PathBuf, source: io::Error },
    #[error("error running hook: {status}, stdout: {stdout}, stderr: {stderr}")]
    Failed {
        status: Status,
        stdout: String,
        stderr: String,
    },
    #[error("hook ran past specified timeout of {:.1}s", .0.as_secs_f64())]
    Timeout(Duration),
    /// `stop` became readable.
    #[error("hook was interrupted")]
    Stopped,
    #[error("error running hook: {0}")]
    Io(#[from] io::Error),
}

/// How a hook ended, in Go's words.
#[derive(Debug, PartialEq, Eq)]
pub struct Status(ExitStatus);

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.code(), self.0.signal()) {
            (Some(code), _) => write!(f, "exit status {code}"),
            (None, Some(signal)) => write!(f, "signal: {}", signal_words(signal)),
            (None, None) => write!(f, "{}", self.0),
        }
    }
}

fn signal_words(signal: i32) -> String {
    // SAFETY: strsignal takes any number and returns a string that lives until
    // the next call in this thread.
    let text = unsafe { libc::strsignal(signal) };
    if text.is_null() {
        return format!("signal {signal}");
    }
    // SAFETY: not null, and NUL-terminated as strsignal(3) promises.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_string_lossy().to_lowercase()
}

/// Runs a hook to its end with `state` on its standard input. A hook that takes too long, or during which `stop`
/// becomes readable or hangs up, is killed, as it is at the end of the caller.
///
/// # Errors
/// See [`Error`].
pub fn run(hook: &Hook<'_>, state: &[u8], stop: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    let _ignored = IgnoreSigpipe::new();
    let mut running = Running::start(hook, state)?;
    let deadline = hook
        .timeout
        .map(|timeout| (Instant::now() + timeout, timeout));
    loop {
        let left = deadline.map(|(end, _)| end.saturating_duration_since(Instant::now()));
        let event = running.wait(left, stop)?;
        match (event, deadline) {
            (Event::Ended, _) => return running.finish(),
            (Event::Stop, _) => return Err(Error::Stopped),
            (Event::Progress, Some((end, timeout))) if Instant::now() >= end => {
                return Err(Error::Timeout(timeout));
            }
            (Event::Progress, _) => {}
        }
    }
}

fn command(hook: &Hook<'_>) -> Command {
    let mut command = Command::new(hook.path);
    if let Some((name, args)) = hook.args.split_first() {
        command.arg0(name).args(args);
    }
    if let Some(dir) = hook.dir {
        command.current_dir(dir);
    }
    command
        .env_clear()
        .envs(hook.env.iter().filter_map(|entry| entry.split_once('=')))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(|| {
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            // Nobody wants its result when the caller is killed.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            let rest = libc::CLOSE_RANGE_CLOEXEC;
            libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, rest);
            Ok(())
        });
    }
    command
}

enum Event {
    Ended,
    Stop,
    /// Something was moved, or time has passed.
    Progress,
}

/// A hook that runs; killed when dropped before its end.
struct Running<'a> {
    child: Child,
    pidfd: OwnedFd,
    /// What is left to be written to its standard input.
    state: &'a [u8],
    outputs: [Vec<u8>; 2],
}

impl<'a> Running<'a> {
    fn start(hook: &Hook<'_>, state: &'a [u8]) -> Result<Running<'a>, Error> {
        let mut child = command(hook).spawn().map_err(|source| Error::Start {
            path: hook.path.to_owned(),
            source,
        })?;
        let prepared = prepare(&child);
        let pidfd = match prepared {
            Ok(pidfd) => pidfd,
            Err(e) => {
                kill(&mut child);
                return Err(e.into());
            }
        };
        Ok(Running {
            child,
            pidfd,
            state,
            outputs: [Vec::new(), Vec::new()],
        })
    }

    fn wait(&mut self, left: Option<Duration>, stop: Option<BorrowedFd<'_>>) -> io::Result<Event> {
        let fd = |fd: Option<i32>, events| libc::pollfd {
            // poll(2) skips negative descriptors.
            fd: fd.unwrap_or(-1),
            events,
            revents: 0,
        };
        if self.state.is_empty() {
            // End of file.
            drop(self.child.stdin.take());
        }
        let raw = |fd: &dyn AsRawFd| fd.as_raw_fd();
        let mut fds = [
            fd(self.child.stdin.as_ref().map(|f| raw(f)), libc::POLLOUT),
            fd(self.child.stdout.as_ref().map(|f| raw(f)), libc::POLLIN),
            fd(self.child.stderr.as_ref().map(|f| raw(f)), libc::POLLIN),
            fd(Some(self.pidfd.as_raw_fd()), libc::POLLIN),
            fd(stop.map(|f| f.as_raw_fd()), libc::POLLIN),
        ];
        // Rounded up, so that the last wait does not spin.
        let timeout = left.map_or(-1, |left| {
            i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX)
        });
        // SAFETY: the array is valid and has the length given.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::Interrupted => Ok(Event::Progress),
                _ => Err(error),
            };
        }
        if fds[0].revents != 0 {
            self.feed()?;
        }
        self.drain()?;
        if fds[3].revents != 0 {
            return Ok(Event::Ended);
        }
        Ok(match fds[4].revents {
            0 => Event::Progress,
            _ => Event::Stop,
        })
    }

    fn feed(&mut self) -> io::Result<()> {
        let Some(stdin) = &mut self.child.stdin else {
            return Ok(());
        };
        match stdin.write(self.state) {
            Ok(written) => self.state = &self.state[written..],
            // A hook need not read its input.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => self.state = &[],
            Err(e) if is_transient(&e) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Reads what there is.
    fn drain(&mut self) -> io::Result<()> {
        let [out, err] = &mut self.outputs;
        drain(&mut self.child.stdout, out)?;
        drain(&mut self.child.stderr, err)
    }

    fn finish(mut self) -> Result<(), Error> {
        self.drain()?;
        let status = self.child.wait()?;
        if status.success() {
            return Ok(());
        }
        let [stdout, stderr] =
            std::mem::take(&mut self.outputs).map(|b| String::from_utf8_lossy(&b).into_owned());
        Err(Error::Failed {
            status: Status(status),
            stdout,
            stderr,
        })
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}

/// Ends a child and reaps it; does nothing after its end.
fn kill(child: &mut Child) {
    // Both fail only for a child that has been reaped.
    let _ = child.kill();
    let _ = child.wait();
}

fn prepare(child: &Child) -> io::Result<OwnedFd> {
    for fd in [
        child.stdin.as_ref().map(AsRawFd::as_raw_fd),
        child.stdout.as_ref().map(AsRawFd::as_raw_fd),
        child.stderr.as_ref().map(AsRawFd::as_raw_fd),
    ]
    .into_iter()
    .flatten()
    {
        // SAFETY: our end of a pipe, which nobody else uses.
        if unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: plain integers; the child has not been reaped.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    match i32::try_from(pidfd) {
        // SAFETY: just made for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Reads what there is, within bounds; at its end the pipe is closed.
fn drain(pipe: &mut Option<impl Read>, kept: &mut Vec<u8>) -> io::Result<()> {
    let mut block = [0; BLOCK];
    for _ in 0..MAX_BLOCKS {
        let Some(open) = pipe else { break };
        match open.read(&mut block) {
            Ok(0) => *pipe = None,
            Ok(n) => {
                let room = MAX_OUTPUT.saturating_sub(kept.len());
                kept.extend_from_slice(&block[..n.min(room)]);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

/// A hook that ends without reading its input must not end its caller.
struct IgnoreSigpipe(libc::sighandler_t);

impl IgnoreSigpipe {
    fn new() -> IgnoreSigpipe {
        // SAFETY: installs no code of ours.
        IgnoreSigpipe(unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) })
    }
}

impl Drop for IgnoreSigpipe {
    fn drop(&mut self) {
        if self.0 != libc::SIG_ERR {
            // SAFETY: what was installed before.
            unsafe { libc::signal(libc::SIGPIPE, self.0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn sh(script: &str, timeout: Option<u64>) -> Result<(), Error> {
        let args = ["sh", "-c", script].map(str::to_owned);
        let hook = Hook {
            path: Path::new("/bin/sh"),
            args: &args,
            env: &["A=1".to_owned()],
            timeout: timeout.map(Duration::from_millis),
            dir: None,
        };
        run(&hook, b"state", None)
    }

    #[test]
    fn a_hook_gets_the_state_and_only_its_environment() {
        sh(
            "[ \"$(cat)\" = state ] && [ \"$A\" = 1 ] && [ -z \"$HOME$CARGO\" ]",
            None,
        )
        .unwrap();
    }

    #[test]
    fn a_failure_is_worded_as_runc_does() {
        let message = |script| sh(script, None).unwrap_err().to_string();
        assert_eq!(
            message("echo out; echo err >&2; exit 3"),
            "error running hook: exit status 3, stdout: out\n, stderr: err\n"
        );
        assert_eq!(
            message("kill -9 $$"),
            "error running hook: signal: killed, stdout: , stderr: "
        );
        let hook = Hook {
            path: Path::new("/no/such"),
            args: &[],
            env: &[],
            timeout: None,
            dir: None,
        };
        let missing = run(&hook, b"", None).unwrap_err().to_string();
        assert_eq!(missing, "fork/exec /no/such: no such file or directory");
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed() {
        let started = Instant::now();
        let message = sh("exec sleep 60", Some(200)).unwrap_err().to_string();
        assert_eq!(message, "hook ran past specified timeout of 0.2s");
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn much_input_unread_and_much_output_do_not_hang() {
        let args = ["sh", "-c", "head -c 1000000 /dev/zero; exit 4"].map(str::to_owned);
        let hook = Hook {
            path: Path::new("/bin/sh"),
            args: &args,
            env: &[],
            timeout: None,
            dir: None,
        };
        let Err(Error::Failed { stdout, .. }) = run(&hook, &vec![b'x'; 1 << 20], None) else {
            panic!("the hook succeeded");
        };
        assert_eq!(stdout.len(), MAX_OUTPUT);
    }

    #[test]
    fn what_a_hook_leaves_in_the_background_is_not_waited_for() {
        let started = Instant::now();
        sh("sleep 5 & exit 0", None).unwrap();
        assert!(started.elapsed() < Duration::from_secs(4));
    }

    #[test]
    fn a_hook_ends_when_it_is_no_longer_wanted() {
        let (read, write) = io::pipe().unwrap();
        drop(write);
        let args = ["sleep", "60"].map(str::to_owned);
        let hook = Hook {
            path: Path::new("/bin/sleep"),
            args: &args,
            env: &[],
            timeout: None,
            dir: None,
        };
        let stopped = run(&hook, b"", Some(read.as_fd()));
        assert!(matches!(stopped, Err(Error::Stopped)));
    }
}
