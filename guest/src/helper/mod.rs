//! A helper: one process, one container operation.
//!
//! Runs libcontainer between what libcontainer leaves to its caller:
//!
//! 1. [`spec`] refuses what could not be honoured and fills in what libcontainer
//!    would otherwise default differently from runc;
//! 2. [`create`] makes the cgroup with its device rules, the user namespace, the
//!    working directory, the terminal;
//! 3. libcontainer builds the container, [`executor`] looks the program up and
//!    executes it;
//! 4. [`create`] brings up the loopback interface, completes the mounts and the
//!    limits from outside, and answers.
//!
//! Or it starts one more process in a container: [`exec`] forks it into the
//! container's cgroup and pid namespace, [`tenant`] is what that process does
//! until it is its program.
//!
//! The process is a copy of the zygote: one thread, no descriptors but its own,
//! `/dev/null` as stdio.

mod create;
mod exec;
mod executor;
mod failure;
mod hooks;
mod joins;
mod late_mounts;
mod lookup;
mod namespaces;
pub(crate) mod passwd;
mod preserved;
mod resources;
mod rlimits;
mod rootfs;
mod seccomp;
pub(crate) mod spec;
mod tenant;
mod terminal;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::sys::stat::{Mode, umask};

use crate::ipc;
use crate::sys;
use crate::zygote::{Answer, Request};

pub use failure::Failure;
pub use terminal::{hang_up as hang_terminal_up, set_size as set_terminal_size};

/// Name of the spec in a container's private directory, as the host sent it.
pub const SPEC_FILE: &str = "spec.json";
/// The system call filter of its processes, if it has one.
pub const SECCOMP_FILE: &str = "seccomp";
/// Where libcontainer waits for the start, relative to the private directory.
pub const NOTIFY_SOCKET: &str = "notify.sock";

/// Never chosen by the kernel's OOM killer.
const OOM_NEVER: &str = "-1000";

/// What a helper has made.
pub struct NewProcess {
    /// In the guest's own pid namespace.
    pub pid: i32,
    /// Master of its terminal.
    pub terminal: Option<OwnedFd>,
}

/// Brings the zygote into the state every helper starts from.
///
/// # Errors
/// Of opening `/dev/null`.
pub fn prepare_zygote() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    for stdio in 0..3 {
        sys::dup2(&null, stdio)?;
    }
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    // Refused in a container that runs the tests, and only a precaution.
    drop(std::fs::write("/proc/self/oom_score_adj", OOM_NEVER));
    Ok(())
}

/// Waits for one request, carries it out and answers.
///
/// # Errors
/// Of the sockets; failures of the operation are answered.
pub fn run(requests: &OwnedFd) -> io::Result<()> {
    let Some((request, fds)) = ipc::receive(requests)? else {
        return Ok(());
    };
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let request = Request::decode(&request).ok_or_else(|| invalid("not a request"))?;
    let mut fds = preserved::place(request.preserved(), fds)?.into_iter();
    let answers = fds.next().ok_or_else(|| invalid("no answer socket"))?;
    let me = sys::pidfd_open(nix::unistd::getpid().as_raw())?;
    ipc::send(&answers, &Answer::Started.encode(), &[me.as_raw_fd()])?;
    drop(me);
    reset_inherited_state();
    let made = match &request {
        Request::Create(request) => create::create(request, fds.collect()),
        Request::Exec(request) => exec::exec(request, fds),
    };
    match made {
        Ok(made) => {
            let master: Vec<_> = made.terminal.iter().map(AsRawFd::as_raw_fd).collect();
            ipc::send(
                &answers,
                &Answer::Created { pid: made.pid }.encode(),
                &master,
            )?;
        }
        Err(failure) => {
            let (kind, message) = failure.into_parts();
            ipc::send(&answers, &Answer::Failed { kind, message }.encode(), &[])?;
        }
    }
    // The agent closes its end when it knows the process; see zygote.rs.
    File::from(answers).read_exact(&mut [0]).or(Ok(()))
}

/// What a container must not inherit from the agent: the signals Rust's runtime
/// ignores and the agent's file limit.
fn reset_inherited_state() {
    for number in Signal::iterator() {
        // SAFETY: restores the default action; no handler runs in this process.
        // Fails for SIGKILL and SIGSTOP, which have no other.
        let _ = unsafe { signal(number, SigHandler::SigDfl) };
    }
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
    let nofile = libc::rlimit {
        rlim_cur: crate::boot::CONTAINER_NOFILE,
        rlim_max: crate::boot::MAX_NOFILE,
    };
    // SAFETY: the struct is valid; a refusal leaves the limit as it is.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const nofile) };
}
