//! The process of an exec, from its birth to its program.
//!
//! The order is runc's: what needs the machine's privileges first, then the
//! container's namespaces, then its user and capabilities, the seccomp filter as
//! late as it can be loaded. After the namespaces nothing of the machine is open
//! but the report socket, so that no path of the container can lead out through
//! a descriptor (CVE-2024-21626).

use std::fmt::Display;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use kuasar_runv_protocol::seccomp::Filter;
use kuasar_runv_protocol::words::words;
use libcontainer::capabilities::{drop_privileges, reset_effective};
use libcontainer::process::cpu_affinity::set_cpuset_affinity_from_string;
use libcontainer::syscall::Syscall;
use libcontainer::syscall::syscall::create_syscall;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Pid, Uid, chdir, setgroups, setresgid, setresuid, setsid};
use oci_spec::runtime::{ExecCPUAffinity, LinuxPersonalityDomain, Process, Spec};

use super::exec::namespaces_of;
use super::executor::Program;
use super::failure::chain;
use super::{preserved, seccomp, spec, terminal};
use crate::zygote::ExecRequest;
use crate::{ipc, sys};

/// What a process is made from.
pub struct Tenant<'a> {
    pub request: &'a ExecRequest,
    pub process: &'a Process,
    /// The spec of its container.
    pub container: &'a Spec,
    /// The container's system call filter.
    pub filter: Option<&'a Filter>,
    /// A pidfd of the container's first process.
    pub init: OwnedFd,
    /// The announced streams.
    pub stdio: Vec<OwnedFd>,
}

/// What it tells its helper. The end of the socket says that the program runs.
pub enum Report {
    /// The master of its terminal.
    Terminal(OwnedFd),
    /// It could not be started.
    Failed(String),
}

const TERMINAL: u8 = 0;
const FAILED: u8 = 1;

impl Report {
    /// # Errors
    /// `InvalidData` for what no tenant sends.
    pub fn decode(body: &[u8], fds: Vec<OwnedFd>) -> io::Result<Report> {
        match (body.split_first(), fds.into_iter().next()) {
            (Some((&TERMINAL, _)), Some(master)) => Ok(Report::Terminal(master)),
            (Some((&FAILED, text)), None) => {
                Ok(Report::Failed(String::from_utf8_lossy(text).into_owned()))
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Becomes the program, or reports why not. `cgroup` is where it has to write
/// itself into, if it was not born in its cgroup.
pub fn run(tenant: Tenant<'_>, report: OwnedFd, cgroup: Option<OwnedFd>) -> ! {
    let process = tenant.process;
    match prepare(tenant, &report, cgroup.as_ref()) {
        Ok(program) => {
            // From here on only the kernel can refuse the program, and that is
            // told where its user looks.
            drop(report);
            match cgroup.map(|cgroup| fs::File::from(cgroup).write_all(b"0")) {
                Some(Err(e)) => drop(writeln!(io::stderr(), "joining the cgroup: {}", words(&e))),
                _ => program.become_program(args(process), process.user().uid()),
            }
        }
        Err(message) => {
            let mut body = vec![FAILED];
            body.extend_from_slice(message.as_bytes());
            body.truncate(ipc::MAX_BODY);
            // Without its helper there is nobody to tell.
            drop(ipc::send(&report, &body, &[]));
        }
    }
    // SAFETY: ends this process without running the helper's destructors.
    unsafe { libc::_exit(1) }
}

fn args(process: &Process) -> &[String] {
    process.args().as_deref().unwrap_or_default()
}

/// An error in the words of Go, after what was being done.
fn at<E: Into<io::Error>>(what: impl Display) -> impl FnOnce(E) -> String {
    move |e| format!("{what}: {}", words(&e.into()))
}

fn prepare(
    tenant: Tenant<'_>,
    report: &OwnedFd,
    cgroup: Option<&OwnedFd>,
) -> Result<Program, String> {
    let Tenant {
        request,
        process,
        container,
        filter,
        init,
        stdio,
    } = tenant;
    let program = Program::new(checked_env(process)?, None);
    setsid().map_err(at("setsid"))?;
    set_limits(process)?;
    if let Some(cpus) = process.exec_cpu_affinity() {
        set_affinity(cpus)?;
    }
    redirect(request.stdio, &stdio).map_err(at("redirecting stdio"))?;
    drop(stdio);
    let namespaces = namespaces_of(container);
    setns(&init, namespaces).map_err(at("entering the container's namespaces"))?;
    drop(init);
    close_all_but(preserved::end(request.preserved), &[Some(report), cgroup])
        .map_err(at("closing descriptors"))?;
    if namespaces.contains(CloneFlags::CLONE_NEWUSER) {
        become_root_of_user_namespace()?;
    }
    if process.terminal() == Some(true) {
        let size = process.console_size().map(|s| (s.height(), s.width()));
        let master = terminal::make_own(size, process.user().uid(), request.plain_newlines)
            .map_err(at("open /dev/ptmx"))?;
        ipc::send(report, &[TERMINAL], &[master.as_raw_fd()])
            .map_err(at("sending the terminal"))?;
    }
    set_personality(container);
    confine(request, process, container, filter)?;
    program.prepare(args(process))?;
    Ok(program)
}

/// The environment, refused in runc's words.
fn checked_env(process: &Process) -> Result<&[String], String> {
    let env = process.env().as_deref().unwrap_or_default();
    for entry in env {
        if entry.starts_with('=') {
            return Err(format!(
                "environment variable name can't be empty: {entry:?}"
            ));
        }
        if entry.contains('\0') {
            return Err(format!(
                "environment variable {entry:?} can't contain null byte"
            ));
        }
        if !entry.contains('=') {
            return Err(format!("invalid environment variable: {entry:?}"));
        }
    }
    Ok(env)
}

/// Raising limits takes the machine's privileges. Without any, those every
/// container starts with.
fn set_limits(process: &Process) -> Result<(), String> {
    let syscall = create_syscall();
    for limit in process.rlimits().iter().flatten() {
        syscall
            .set_rlimit(limit)
            .map_err(|e| format!("error setting rlimit {:?}: {}", limit.typ(), chain(&e)))?;
    }
    Ok(())
}

/// The process is in the container's cgroup already, so `final` is what counts;
/// `initial` is for the way there.
fn set_affinity(cpus: &ExecCPUAffinity) -> Result<(), String> {
    let lists = [cpus.initial(), cpus.cpu_affinity_final()];
    let last = lists.into_iter().flatten().rfind(|list| !list.is_empty());
    match last {
        None => Ok(()),
        Some(list) => set_cpuset_affinity_from_string(Pid::this(), list)
            .map_err(|e| format!("error setting CPU affinity: {}", chain(&e))),
    }
}

/// Announced streams become stdio; the others are `/dev/null` already.
fn redirect(announced: [bool; 3], streams: &[OwnedFd]) -> io::Result<()> {
    let targets = (0..).zip(announced).filter(|(_, announced)| *announced);
    for (stream, (target, _)) in streams.iter().zip(targets) {
        sys::dup2(stream, target)?;
    }
    Ok(())
}

/// Closes everything from the number `first` on but these.
fn close_all_but(first: RawFd, kept: &[Option<&OwnedFd>]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept
        .iter()
        .flatten()
        .map(|fd| fd.as_raw_fd().unsigned_abs())
        .collect();
    kept.sort_unstable();
    let mut first = first.unsigned_abs();
    for last in kept.into_iter().chain([u32::MAX]) {
        if first < last {
            let end = if last == u32::MAX { last } else { last - 1 };
            // SAFETY: what owns one of these descriptors belongs to the helper's
            // part of this process, of which nothing runs any more.
            sys::check(unsafe { libc::syscall(libc::SYS_close_range, first, end, 0) })?;
        }
        first = last.saturating_add(1);
    }
    Ok(())
}

/// After setns(2) this process is nobody in the container's user namespace.
fn become_root_of_user_namespace() -> Result<(), String> {
    let root = (Uid::from_raw(0), Gid::from_raw(0));
    let became = setresgid(root.1, root.1, root.1).and_then(|()| setresuid(root.0, root.0, root.0));
    match became {
        // A namespace without a root: what follows needs none.
        Ok(()) | Err(nix::Error::EINVAL) => Ok(()),
        Err(e) => Err(at("becoming root of the user namespace")(e)),
    }
}

/// Of linux/personality.h.
const PER_LINUX32: libc::c_ulong = 8;

fn set_personality(container: &Spec) {
    let personality = container
        .linux()
        .as_ref()
        .and_then(|l| l.personality().as_ref());
    if let Some(personality) = personality {
        let domain = match personality.domain() {
            LinuxPersonalityDomain::PerLinux => 0,
            LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
        };
        // SAFETY: plain integers; cannot fail for these.
        unsafe { libc::personality(domain) };
    }
}

/// Working directory, user, capabilities and system call filter.
fn confine(
    request: &ExecRequest,
    process: &Process,
    container: &Spec,
    filter: Option<&Filter>,
) -> Result<(), String> {
    let mask = process.user().umask().unwrap_or(request.umask);
    umask(Mode::from_bits_truncate(mask));
    let no_new_privileges = process.no_new_privileges() == Some(true);
    if no_new_privileges {
        // SAFETY: plain integers.
        sys::check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
            .map_err(at("set no new privileges"))?;
    }
    let cwd = process.cwd();
    // As root, who may enter directories that the user may not; and if root may
    // not, as the user (runc).
    let entered = match chdir(cwd) {
        Ok(()) => true,
        Err(nix::Error::EACCES | nix::Error::EPERM) => false,
        Err(e) => return Err(no_cwd(cwd, e)),
    };
    let syscall = create_syscall();
    set_user(syscall.as_ref(), process, container)?;
    if !entered {
        chdir(cwd).map_err(|e| no_cwd(cwd, e))?;
    }
    verify_cwd(cwd)?;
    // Without no_new_privs loading a filter is a privilege.
    let (early, late) = match no_new_privileges {
        true => (None, filter),
        false => (filter, None),
    };
    early.map_or(Ok(()), seccomp::load)?;
    set_capabilities(syscall.as_ref(), process, container)?;
    late.map_or(Ok(()), seccomp::load)
}

fn no_cwd(cwd: &Path, e: nix::Error) -> String {
    at(format!("chdir to cwd ({cwd:?}) set in config.json failed"))(e)
}

/// A directory that was reached through a leaked descriptor has no path here.
fn verify_cwd(cwd: &Path) -> Result<(), String> {
    match nix::unistd::getcwd() {
        Ok(path) if path.is_absolute() => Ok(()),
        Ok(_) => Err(no_cwd(cwd, nix::Error::ENOENT)),
        Err(e) => Err(no_cwd(cwd, e)),
    }
}

fn set_user(syscall: &dyn Syscall, process: &Process, container: &Spec) -> Result<(), String> {
    let user = process.user();
    let groups: Vec<Gid> = user
        .additional_gids()
        .iter()
        .flatten()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    let in_user_namespace = namespaces_of(container).contains(CloneFlags::CLONE_NEWUSER);
    match setgroups(&groups) {
        // The namespace may forbid it (user_namespaces(7)); runc then does without.
        Err(nix::Error::EPERM) if in_user_namespace => {}
        done => done.map_err(at("unable to setup user: setgroups"))?,
    }
    syscall
        .set_id(Uid::from_raw(user.uid()), Gid::from_raw(user.gid()))
        .map_err(|e| match in_user_namespace {
            true => {
                "unable to setup user: cannot set uid or gid to unmapped user in user namespace"
                    .to_owned()
            }
            false => format!("unable to setup user: {}", chain(&e)),
        })
}

fn set_capabilities(
    syscall: &dyn Syscall,
    process: &Process,
    container: &Spec,
) -> Result<(), String> {
    let of_init = container.process().as_ref();
    let given = process
        .capabilities()
        .as_ref()
        .or_else(|| of_init.and_then(|p| p.capabilities().as_ref()));
    let wanted = spec::complete_capabilities(given);
    reset_effective(syscall)
        .and_then(|()| drop_privileges(&wanted, syscall))
        .map_err(|e| format!("unable to apply caps: {}", chain(&e)))
}
