//! The process that the host's kernel kills: this binary under another name. It
//! waits to be told how much memory to take, takes it, and ends by itself when the
//! kernel does not mind.

use std::ffi::CStr;
use std::fs;
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, set_parent_process_death_signal};
use rustix::thread::CapabilitySet;

use super::Writable;
use crate::sys::capabilities::limit_to;
use crate::sys::process::close_on_exec_from;
use crate::sys::seqpacket::wait_readable;

/// The victim's name on the hidden command line.
pub const COMMAND: &str = "oom-victim";
/// For the kernel's log, at most 15 bytes.
const NAME: &CStr = c"runv-oom-report";
/// What it takes at a time, in bytes.
const PIECE: u64 = 1 << 20;
/// The first descriptor it does not inherit.
const FIRST_OTHER_FD: i32 = 3;
/// The highest there is (proc(5)). To raise one's own takes no privilege.
const OOM_SCORE_ADJ: &str = "1000";

/// Runs a victim; the return value is the exit code.
pub fn main() -> u8 {
    // The host's kernel log names it; without the name it says "exe".
    let _ = rustix::thread::set_name(NAME);
    let mut bytes = [0; 8];
    // The end of the stream: whoever made it has ended.
    let told = limit_to(CapabilitySet::empty()).and_then(|()| io::stdin().read_exact(&mut bytes));
    if told.is_err() {
        return 1;
    }
    let pieces = u64::from_ne_bytes(bytes) / PIECE;
    let mut taken = Vec::new();
    for _ in 0..pieces {
        // Every page is written to.
        taken.push(vec![1u8; 1 << 20]);
        black_box(&taken);
    }
    0
}

/// A victim, for who made it. Ends with it, and with the thread that made it.
pub struct Victim(Child);

impl Victim {
    /// # Errors
    /// As fork(2) and exec(2), or when it would not be the first to be killed.
    pub fn spawn() -> io::Result<Victim> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("kuasar-runv")
            .arg(COMMAND)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: prctl and close_range are async-signal-safe and allocate nothing.
        unsafe {
            command.pre_exec(|| {
                set_parent_process_death_signal(Some(Signal::KILL))?;
                close_on_exec_from(FIRST_OTHER_FD)
            });
        }
        let victim = Victim(command.spawn()?);
        let processes = Writable::new(Path::new("/proc"))?;
        let file = format!("{}/oom_score_adj", victim.0.id());
        fs::write(processes.path().join(file), OOM_SCORE_ADJ)?;
        Ok(victim)
    }

    /// Moves it into the cgroup.
    ///
    /// # Errors
    /// Of `cgroup.procs`.
    pub fn enter(&self, cgroup: &Path) -> io::Result<()> {
        fs::write(cgroup.join("cgroup.procs"), self.0.id().to_string())
    }

    /// Has it take so many bytes and waits for its end, or until the time is over.
    ///
    /// # Errors
    /// As write(2), pidfd_open(2) and poll(2).
    pub fn take(&mut self, bytes: u64, deadline: Duration) -> io::Result<()> {
        let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        if let Some(stdin) = &mut self.0.stdin {
            stdin.write_all(&bytes.to_ne_bytes())?;
        }
        wait_readable(pidfd.as_fd(), deadline).map(drop)
    }

    /// Ends it, if it has not ended.
    pub fn end(&mut self) {
        if let Err(e) = self.0.kill().and_then(|()| self.0.wait()) {
            log::warn!("ending the process {}: {e}", self.0.id());
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.end();
    }
}
