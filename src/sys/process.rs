//! Processes named so that a recycled pid is never mistaken for one of ours.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::seqpacket::wait_readable;

/// A process of this boot: pid and start time, which together are unique until
/// reboot (proc(5), `/proc/PID/stat`, field 22).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    pub pid: i32,
    /// In clock ticks after boot.
    pub start_time: u64,
}

/// What `/proc/PID/stat` says of a process.
struct Stat {
    state: char,
    start_time: u64,
}

fn stat(pid: i32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command name is in parentheses and may itself contain any character.
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "unexpected /proc/PID/stat");
    let (_, rest) = text.rsplit_once(')').ok_or_else(invalid)?;
    let mut fields = rest.split_whitespace();
    let state = fields.next().and_then(|s| s.chars().next());
    // `state` is field 3, so field 22 is the 19th after it.
    let start_time = fields.nth(18).and_then(|s| s.parse().ok());
    match (state, start_time) {
        (Some(state), Some(start_time)) => Ok(Stat { state, start_time }),
        _ => Err(invalid()),
    }
}

impl ProcessRef {
    /// The running process with this pid.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn of(pid: i32) -> io::Result<ProcessRef> {
        Ok(ProcessRef {
            pid,
            start_time: stat(pid)?.start_time,
        })
    }

    /// This process.
    ///
    /// # Errors
    /// When /proc is not mounted.
    pub fn current() -> io::Result<ProcessRef> {
        // A pid fits into an i32 on Linux (PID_MAX_LIMIT is 2^22).
        #[allow(clippy::cast_possible_wrap)]
        Self::of(std::process::id() as i32)
    }

    /// Whether it still runs. A zombie has ended.
    #[must_use]
    pub fn is_alive(self) -> bool {
        stat(self.pid)
            .is_ok_and(|s| s.start_time == self.start_time && !matches!(s.state, 'Z' | 'X' | 'x'))
    }

    /// A descriptor that can only ever mean this process; `None` when it has ended.
    ///
    /// # Errors
    /// As pidfd_open(2).
    pub fn pidfd(self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(None);
        };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // Checked after the open: if it is alive now, the descriptor is its own.
        Ok(self.is_alive().then_some(fd))
    }

    /// Sends a signal; `false` when the process has ended.
    ///
    /// # Errors
    /// As pidfd_send_signal(2).
    pub fn signal(self, signal: Signal) -> io::Result<bool> {
        let Some(fd) = self.pidfd()? else {
            return Ok(false);
        };
        match pidfd_send_signal(fd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits for its end (it may still be a zombie then); `false` after `deadline`.
    ///
    /// # Errors
    /// As pidfd_open(2) and poll(2).
    pub fn wait(self, deadline: Duration) -> io::Result<bool> {
        match self.pidfd()? {
            None => Ok(true),
            Some(fd) => wait_readable(fd.as_fd(), deadline),
        }
    }

    /// SIGKILL, then [`wait`](Self::wait).
    ///
    /// # Errors
    /// `TimedOut` when it is still there after `deadline`.
    pub fn kill(self, deadline: Duration) -> io::Result<()> {
        self.signal(Signal::KILL)?;
        if self.wait(deadline)? {
            Ok(())
        } else {
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("process {} does not end after SIGKILL", self.pid),
            ))
        }
    }
}

/// The kernel's id of this boot, so that state of an earlier boot is recognised.
///
/// # Errors
/// When /proc is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// Marks every descriptor from `first` on close-on-exec.
///
/// # Errors
/// As close_range(2).
pub fn close_on_exec_from(first: i32) -> io::Result<()> {
    let first = libc::c_uint::try_from(first).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: only sets a flag; no descriptor becomes invalid before the exec.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn another_start_time_is_another_process() {
        let me = ProcessRef::current().unwrap();
        assert!(me.is_alive());
        let earlier = ProcessRef {
            start_time: me.start_time - 1,
            ..me
        };
        assert!(!earlier.is_alive());
        assert!(!earlier.signal(Signal::KILL).unwrap());
    }

    #[test]
    fn a_zombie_has_ended() {
        let mut child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let child_ref = ProcessRef::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(!child_ref.wait(Duration::from_millis(10)).unwrap());
        child_ref.kill(Duration::from_secs(5)).unwrap();
        assert!(!child_ref.is_alive());
        child.wait().unwrap();
        assert!(child_ref.wait(Duration::ZERO).unwrap());
    }
}
