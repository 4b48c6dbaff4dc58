//! Starting one more process in a container.
//!
//! ```text
//! helper ──fork into cgroup and pid namespace──▶ tenant ──execve──▶ program
//!    ▲                                             │
//!    └── report socket: terminal, failure, or its end: the program runs
//! ```
//!
//! libcontainer's tenant builder is not used: it reads back a state file that
//! its init builder writes, forks twice, and differs from runc in what a process
//! inherits. Its lower layers (capabilities, seccomp) are.
//!
//! What a process inherits from its container follows runc: seccomp filter and
//! `oom_score_adj` always, capabilities where the request has none, no rlimits.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kuasar_runv_protocol::words::words;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use oci_spec::runtime::{Process, Spec};

use super::create::{owner_of_stdio, prepare_self};
use super::failure::Failure;
use super::tenant::{self, Report, Tenant};
use super::{NewProcess, SPEC_FILE, seccomp, spec, terminal};
use crate::cgroup::{self, Cgroup};
use crate::ipc;
use crate::sys::{self, Forked};
use crate::zygote::ExecRequest;

/// How long the process may take to become its program. Shorter than the agent's
/// deadline for this helper: a container that is paused at the wrong moment must
/// not leave a process behind that starts when it is resumed.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// Carries out a request; its descriptors are those of [`ExecRequest`].
pub fn exec(
    request: &ExecRequest,
    mut fds: impl Iterator<Item = OwnedFd>,
) -> Result<NewProcess, Failure> {
    let missing = || Failure::Other("a descriptor is missing".to_owned());
    let process = load_process(fds.next().ok_or_else(missing)?)?;
    let init = fds.next().ok_or_else(missing)?;
    let container = spec::load(&request.dir.join(SPEC_FILE))?;
    let filter = seccomp::read(&request.dir)?;
    let has_terminal = process.terminal() == Some(true);
    // With a terminal, the streams are its.
    let stdio: Vec<OwnedFd> = match has_terminal {
        true => Vec::new(),
        false => fds.collect(),
    };
    let uid = owner_of_stdio(&container, Some(&process));
    for stream in &stdio {
        terminal::give_to(stream, uid).map_err(Failure::io("giving stdio to the user"))?;
    }
    let keyring = (!request.no_new_keyring).then_some(request.container_id.as_str());
    prepare_self(&container, keyring)?;
    setns(&init, CloneFlags::CLONE_NEWPID)
        .map_err(Failure::io("entering the container's pid namespace"))?;
    let tenant = Tenant {
        request,
        process: &process,
        container: &container,
        filter: filter.as_ref(),
        init,
        stdio,
    };
    start(tenant)
}

fn load_process(file: OwnedFd) -> Result<Process, Failure> {
    // In the way the spec is read, of which it is a part.
    serde_json::from_reader(BufReader::new(File::from(file)))
        .map_err(|e| Failure::invalid(format!("invalid process: {e}")))
}

/// Forks the process and waits until it is its program.
fn start(tenant: Tenant<'_>) -> Result<NewProcess, Failure> {
    let (ours, theirs) = ipc::pair().map_err(Failure::io("making the report socket"))?;
    let cgroup = open_cgroup(&tenant)?;
    let into = (!tenant.request.late_cgroup).then_some(&cgroup);
    // SAFETY: helpers have one thread.
    let forked = match unsafe { sys::fork_into(into) } {
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            let cgroup = cgroup_of_init(&tenant)?;
            // SAFETY: as above.
            unsafe { sys::fork_into(Some(&cgroup)) }
        }
        forked => forked,
    };
    match forked.map_err(Failure::io(
        "unable to start container process: adding it to the cgroup",
    ))? {
        Forked::Child => {
            drop(ours);
            let late = tenant.request.late_cgroup.then_some(cgroup);
            tenant::run(tenant, theirs, late)
        }
        Forked::Parent(pid) => {
            drop(theirs);
            follow(pid, &ours)
        }
    }
}

/// The process's cgroup: where it is born, or what it writes itself into.
fn open_cgroup(tenant: &Tenant<'_>) -> Result<OwnedFd, Failure> {
    let path = &tenant.request.cgroup;
    let opened = match tenant.request.late_cgroup {
        true => File::options()
            .write(true)
            .open(path.join("cgroup.procs"))
            .map(OwnedFd::from),
        false => open_dir(path),
    };
    opened.map_err(|e| {
        Failure::Other(format!(
            "unable to start container process: error adding pid to cgroups: openat2 {}: {}",
            path.join("cgroup.procs").display(),
            words(&e)
        ))
    })
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let fd = nix::fcntl::open(path, flags, Mode::empty())?;
    // SAFETY: just opened by us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Where the container's first process went: a container that has controllers for
/// cgroups of its own cannot have processes beside them (runc does the same).
fn cgroup_of_init(tenant: &Tenant<'_>) -> Result<OwnedFd, Failure> {
    let own = Cgroup::of(&tenant.request.container_id);
    let failed = || Failure::io("unable to start container process: finding its cgroup");
    if tenant.request.cgroup != own.path() {
        return Err(failed()(io::Error::from_raw_os_error(libc::EBUSY)));
    }
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", tenant.request.init_pid))
        .map_err(failed())?;
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .map(|path| PathBuf::from(cgroup::MOUNT_POINT).join(path))
        .filter(|path| path.starts_with(own.path()))
        .ok_or_else(|| failed()(io::Error::from_raw_os_error(libc::EBUSY)))?;
    open_dir(&path).map_err(failed())
}

/// Waits for what becomes of the process; one that fails is reaped.
fn follow(pid: i32, report: &OwnedFd) -> Result<NewProcess, Failure> {
    let mut terminal = None;
    let end = Instant::now() + START_DEADLINE;
    let failure = loop {
        match next_report(report, end) {
            Ok(Some(Report::Terminal(master))) => terminal = Some(master),
            Ok(Some(Report::Failed(message))) => {
                break format!("unable to start container process: {message}");
            }
            Ok(None) => return Ok(NewProcess { pid, terminal }),
            Err(e) => break format!("waiting for the process to start: {e}"),
        }
    };
    // It ends by itself after a report; it is frozen or stuck if there was none.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    let _ = waitpid(Pid::from_raw(pid), None);
    Err(Failure::Other(failure))
}

fn next_report(report: &OwnedFd, end: Instant) -> io::Result<Option<Report>> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(report.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => break,
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    ipc::receive(report)?
        .map(|(body, fds)| Report::decode(&body, fds))
        .transpose()
}

/// The namespaces of a container, as flags of setns(2) for its first process.
/// Those it shares with the machine are left out.
pub fn namespaces_of(container: &Spec) -> CloneFlags {
    use oci_spec::runtime::LinuxNamespaceType as Kind;
    const CLONE_NEWTIME: libc::c_int = 0x80;
    let namespaces = container
        .linux()
        .as_ref()
        .and_then(|l| l.namespaces().as_deref())
        .unwrap_or_default();
    let mut flags = CloneFlags::empty();
    for namespace in namespaces {
        flags |= match namespace.typ() {
            Kind::Mount => CloneFlags::CLONE_NEWNS,
            Kind::Cgroup => CloneFlags::CLONE_NEWCGROUP,
            Kind::Uts => CloneFlags::CLONE_NEWUTS,
            Kind::Ipc => CloneFlags::CLONE_NEWIPC,
            Kind::User => CloneFlags::CLONE_NEWUSER,
            Kind::Network => CloneFlags::CLONE_NEWNET,
            // nix does not know it.
            Kind::Time => CloneFlags::from_bits_retain(CLONE_NEWTIME),
            // Entered already: it is for children only.
            Kind::Pid => CloneFlags::empty(),
        };
    }
    flags
}
