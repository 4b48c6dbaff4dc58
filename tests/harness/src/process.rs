//! Processes as /proc shows them.

use std::fs;
use std::io;
use std::path::PathBuf;

/// One process, read once.
#[derive(Clone, Debug)]
pub struct Process {
    pub pid: i32,
    pub comm: String,
    /// Arguments joined with blanks.
    pub command_line: String,
    /// Letter of `/proc/PID/stat`: `Z` is a zombie.
    pub state: char,
    pub parent: i32,
}

impl Process {
    /// `None` when there is no such process.
    #[must_use]
    pub fn read(pid: i32) -> Option<Process> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // comm may contain blanks and parentheses; the last one closes it.
        let (head, tail) = stat.rsplit_once(')')?;
        let comm = head.split_once('(')?.1.to_owned();
        let mut fields = tail.split_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command_line = String::from_utf8_lossy(&raw)
            .trim_end_matches('\0')
            .replace('\0', " ");
        Some(Process {
            pid,
            comm,
            command_line,
            state,
            parent,
        })
    }

    #[must_use]
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }

    #[must_use]
    pub fn describe(&self) -> String {
        let Process {
            pid,
            comm,
            command_line,
            state,
            parent,
        } = self;
        format!("process {pid} ({comm}, state {state}, parent {parent}): {command_line}")
    }
}

/// Pids of every process of this pid namespace.
#[must_use]
pub fn all_pids() -> Vec<i32> {
    fs::read_dir("/proc")
        .expect("/proc is mounted")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

/// Whether the process exists and is not a zombie.
#[must_use]
pub fn is_alive(pid: i32) -> bool {
    Process::read(pid).is_some_and(|process| process.is_alive())
}

/// Sends a signal to one process.
///
/// # Errors
/// As kill(2).
pub fn signal(pid: i32, signal: i32) -> io::Result<()> {
    assert!(pid > 1, "refusing to signal pid {pid}");
    // SAFETY: kill takes integers; pid is one process, never a group.
    if unsafe { libc::kill(pid, signal) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A numeric field of `/proc/PID/status`, in the unit the kernel prints (kB for
/// memory). `None` when the process or the field is gone.
#[must_use]
pub fn status_field(pid: i32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Identity of a namespace, such as `mnt:[4026531841]`.
#[must_use]
pub fn namespace(pid: i32, kind: &str) -> Option<String> {
    let link = fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()?;
    Some(link.to_string_lossy().into_owned())
}

/// A path below the root directory of a process.
#[must_use]
pub fn root_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root"))
}
