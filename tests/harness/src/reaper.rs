//! The only place that waits for children.
//!
//! The test process is a subreaper: besides the commands it spawns it inherits
//! every process the runtime orphans. A thread collects all of them, as conmon and
//! containerd's shim do, and keeps their statuses for whoever asks.

use std::collections::HashMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

struct Reaper {
    ended: Mutex<HashMap<i32, ExitStatus>>,
    changed: Condvar,
}

static REAPER: OnceLock<Reaper> = OnceLock::new();

fn reaper() -> &'static Reaper {
    REAPER.get_or_init(|| {
        // SAFETY: prctl with integer arguments; it only sets an attribute of this process.
        let rc = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
        assert_eq!(
            rc,
            0,
            "PR_SET_CHILD_SUBREAPER: {}",
            io::Error::last_os_error()
        );
        thread::Builder::new()
            .name("reaper".into())
            .spawn(collect)
            .unwrap();
        Reaper {
            ended: Mutex::new(HashMap::new()),
            changed: Condvar::new(),
        }
    })
}

fn statuses(reaper: &Reaper) -> MutexGuard<'_, HashMap<i32, ExitStatus>> {
    // A test that panicked while it held the lock left a complete map.
    reaper.ended.lock().unwrap_or_else(PoisonError::into_inner)
}

fn collect() {
    loop {
        // SAFETY: an all-zero siginfo_t is a valid value of the C struct.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // Look without taking it: the status must not be stored before the spawn
        // that made the process has finished (see `spawn`).
        // SAFETY: `info` outlives the call.
        let rc = unsafe { libc::waitid(libc::P_ALL, 0, &mut info, libc::WEXITED | libc::WNOWAIT) };
        if rc != 0 {
            // No children now. New ones may come at any time, also from nowhere
            // (orphans), so there is nothing to wait on.
            thread::sleep(Duration::from_millis(2));
            continue;
        }
        // SAFETY: waitid succeeded, so the fields of SIGCHLD are set.
        let pid = unsafe { info.si_pid() };
        let reaper = reaper();
        let mut ended = statuses(reaper);
        let mut status = 0;
        // SAFETY: `status` outlives the call; `pid` is a zombie child of ours.
        if unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) } == pid {
            ended.insert(pid, ExitStatus::from_raw(status));
            reaper.changed.notify_all();
        }
    }
}

/// Becomes a subreaper now, for tests that need it before their first command.
pub fn install() {
    reaper();
}

/// A child of this process, and this end of the pipes that were asked for.
#[derive(Debug)]
pub struct Spawned {
    pub pid: i32,
    pub stdin: Option<ChildStdin>,
    pub stdout: Option<ChildStdout>,
    pub stderr: Option<ChildStderr>,
}

/// Spawns a command whose end [`wait`] reports.
///
/// # Errors
/// As `Command::spawn`.
pub fn spawn(command: &mut Command) -> io::Result<Spawned> {
    let reaper = reaper();
    // Held across the fork, so that the status of an earlier process with the same
    // pid cannot be taken for this one's.
    let mut ended = statuses(reaper);
    // Waited for by `collect`, which takes the status of every child.
    #[allow(clippy::zombie_processes)]
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).expect("pids are positive ints");
    ended.remove(&pid);
    Ok(Spawned {
        pid,
        stdin: child.stdin,
        stdout: child.stdout,
        stderr: child.stderr,
    })
}

/// Status of a child or adopted orphan, `None` when it still runs at the deadline.
#[must_use]
pub fn wait(pid: i32, deadline: Duration) -> Option<ExitStatus> {
    let reaper = reaper();
    let end = Instant::now() + deadline;
    let mut ended = statuses(reaper);
    loop {
        if let Some(status) = ended.get(&pid) {
            return Some(*status);
        }
        let left = end.checked_duration_since(Instant::now())?;
        ended = reaper
            .changed
            .wait_timeout(ended, left)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}
