//! Creating a container, from the request to the waiting process.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use libcontainer::notify_socket::NotifyListener;
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::container_main_process;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::validator::Validator;
use oci_spec::runtime::{LinuxResources, Process, Spec};

use super::executor::Program;
use super::failure::{self, Failure};
use super::hooks::StartHooks;
use super::namespaces::Network;
use super::seccomp::Confinement;
use super::terminal::{self, ConsoleSocket};
use super::{
    NOTIFY_SOCKET, NewProcess, SPEC_FILE, joins, late_mounts, namespaces, rlimits, rootfs, spec,
};
use crate::cgroup::{Cgroup, devices};
use crate::sys;
use crate::zygote::CreateRequest;

/// Makes a container whose process waits for the start. On failure the private directory and the cgroup are
/// left to the agent.
///
/// Enters libcontainer below its `ContainerBuilder`, which would write the spec
/// and a state file and read both again: nobody here needs them, and under
/// emulation that was a third of the time of a create.
pub fn create(request: &CreateRequest, mut fds: Vec<OwnedFd>) -> Result<NewProcess, Failure> {
    let streams = request.stdio.iter().filter(|announced| **announced).count();
    let joined = fds.split_off(streams.min(fds.len()));
    let stdio = fds;
    failure::start_collecting().map_err(Failure::io("making a pipe"))?;
    let mut spec = spec::load(&request.dir.join(SPEC_FILE))?;
    let cgroup = Cgroup::of(&request.container_id);
    let late_mounts = late_mounts::take(&mut spec);
    spec::normalise(&mut spec, &cgroup.path_in_hierarchy())?;
    Validator::validate_spec(&spec).map_err(|e| Failure::invalid(failure::chain(&e)))?;

    rootfs::stage(&mut spec, &request.dir)?;
    rootfs::make_outer_devices(&mut spec)?;
    rootfs::clear_dev(&spec)?;
    rootfs::copy_up(&mut spec, &request.dir)?;
    let late_cwd = rootfs::make_cwd(&mut spec)?;
    prepare_cgroup(&cgroup, &mut spec)?;
    let keyring = (!request.no_new_keyring).then_some(request.container_id.as_str());
    prepare_self(&spec, keyring)?;
    let uid = owner_of_stdio(&spec, spec.process().as_ref());
    let network = Network::of(spec.linux().as_ref(), request.joins);
    let _joined = joins::enter(&mut spec, request.joins, joined)?;
    let _user_namespace = match spec.linux_mut() {
        Some(linux) => namespaces::make_user_namespace(linux)?,
        None => None,
    };
    let limits = rlimits::take(&mut spec);
    let program = Program::new(given_env(&spec), late_cwd)
        .with_hooks(StartHooks::take(&mut spec, &request.container_id)?)
        .with_limits(&limits)
        .with_confinement(Confinement::take(&mut spec, &request.dir)?);
    let terminal = spec.process().as_ref().and_then(|p| p.terminal()) == Some(true);
    let console = match terminal {
        true => Some(ConsoleSocket::new()?),
        false => None,
    };
    // With a terminal, the streams are its.
    let stdio = if terminal { Vec::new() } else { stdio };
    for stream in &stdio {
        terminal::give_to(stream, uid).map_err(Failure::io("giving stdio to the user"))?;
    }
    let spec = Rc::new(spec);
    let pid = build(request, &spec, program, console.as_ref(), &stdio, &cgroup)?;
    let master = console.map(ConsoleSocket::receive).transpose()?;
    if let (Some(master), Some(process)) = (&master, spec.process()) {
        terminal::finish(master, process, uid, request.plain_newlines)?;
    }
    network.bring_up_loopback(pid)?;
    rlimits::raise(pid, &limits)?;
    late_mounts::apply(pid, &late_mounts)?;
    // This process is about to exit; taking the spec apart would be work for
    // nothing.
    std::mem::forget(spec);
    Ok(NewProcess {
        pid,
        terminal: master,
    })
}

/// Has libcontainer make the container; returns the pid of its waiting process.
fn build(
    request: &CreateRequest,
    spec: &Rc<Spec>,
    program: Program,
    console: Option<&ConsoleSocket>,
    stdio: &[OwnedFd],
    cgroup: &Cgroup,
) -> Result<i32, Failure> {
    let rootfs = spec.root().as_ref().map(|r| r.path().clone());
    let notify_path = request.dir.join(NOTIFY_SOCKET);
    let notify_listener = NotifyListener::new(&notify_path)
        .map_err(|e| Failure::Other(format!("making the notify socket: {}", failure::chain(&e))))?;
    let mut streams = stdio.iter().map(AsRawFd::as_raw_fd);
    let [stdin, stdout, stderr] = request
        .stdio
        .map(|announced| announced.then(|| streams.next()).flatten());
    let args = ContainerArgs {
        container_type: ContainerType::InitContainer,
        syscall: SyscallType::Linux,
        spec: Rc::clone(spec),
        rootfs: rootfs.unwrap_or_default(),
        console_socket: console.map(ConsoleSocket::container_end),
        notify_listener,
        preserve_fds: i32::from(request.preserved),
        // Only seccomp listeners are told about it.
        container: None,
        // A new user namespace is joined like one that exists.
        user_ns_config: None,
        cgroup_config: libcgroups::common::CgroupConfig {
            cgroup_path: cgroup.path_in_hierarchy(),
            systemd_cgroup: false,
            container_name: request.container_id.clone(),
        },
        detached: true,
        executor: Box::new(program),
        no_pivot: request.no_pivot,
        stdin,
        stdout,
        stderr,
        as_sibling: false,
        pid_file: None,
    };
    let pid = container_main_process(&args)
        .map_err(|e| missing_sysctl(spec).unwrap_or_else(|| Failure::from_libcontainer(&e)))?;
    // As above.
    std::mem::forget(args);
    Ok(pid.as_raw())
}

/// A setting that does not exist, of which libcontainer's error tells no name.
fn missing_sysctl(spec: &Spec) -> Option<Failure> {
    let settings = spec.linux().as_ref()?.sysctl().as_ref()?;
    settings.keys().find_map(|name| {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        // Seen from this process's network, which has no interface of the
        // container's: those stay libcontainer's to report.
        let is_missing = !path.contains("/conf/") && !std::path::Path::new(&path).exists();
        is_missing.then(|| {
            Failure::Other(format!(
                "unable to start container process: error during container init: \
                 open {path}: no such file or directory"
            ))
        })
    })
}

/// The environment of the spec, without the placeholder `normalise` added.
fn given_env(spec: &Spec) -> &[String] {
    spec.process()
        .as_ref()
        .and_then(|p| p.env().as_deref())
        .and_then(|env| env.split_last())
        .map_or(&[], |(_, given)| given)
}

/// What a process of the container inherits from this one; `keyring` is the id of
/// the container that gets a session keyring.
pub fn prepare_self(spec: &Spec, keyring: Option<&str>) -> Result<(), Failure> {
    let oom_score_adj = spec.process().as_ref().and_then(|p| p.oom_score_adj());
    std::fs::write(
        "/proc/self/oom_score_adj",
        oom_score_adj.unwrap_or(0).to_string(),
    )
    .map_err(Failure::io("setting oom_score_adj"))?;
    // Processes in namespaces that are joined must not reach into this one
    // (CVE-2016-9962).
    // SAFETY: plain integers; cannot fail for 0.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
    keyring.map_or(Ok(()), join_new_keyring)
}

/// Makes the cgroup and confines its devices. libcontainer finds it and only
/// sets the limits: it has no device rules without a BPF library.
fn prepare_cgroup(cgroup: &Cgroup, spec: &mut Spec) -> Result<(), Failure> {
    cgroup.create().map_err(Failure::io("making the cgroup"))?;
    let mut resources = spec.linux().as_ref().and_then(|l| l.resources().clone());
    if let Some(memory) = resources.as_ref().and_then(|r| r.memory().as_ref()) {
        // The sum of memory and swap in the spec, swap alone in cgroup v2.
        // libcgroups takes the difference for "not set" when it is zero.
        let no_swap = memory.limit().is_some_and(|l| l > 0) && memory.limit() == memory.swap();
        if no_swap {
            cgroup
                .forbid_swap()
                .map_err(Failure::io("forbidding swap"))?;
        }
    }
    if let Some(io) = resources.as_mut().and_then(|r| r.block_io_mut().as_mut()) {
        // libcgroups computes it in 16 bits, which the formula leaves from 17 on.
        let weight = io.weight().filter(|weight| *weight > 0);
        io.set_weight(None);
        if let Some(weight) = weight {
            cgroup
                .set_io_weight(weight)
                .map_err(Failure::io("setting the weight of block I/O"))?;
        }
    }
    let rules = resources.as_mut().and_then(|r| r.devices_mut().take());
    let rules =
        devices::rules(&rules.unwrap_or_default()).map_err(|e| Failure::invalid(e.to_string()))?;
    devices::attach(cgroup, &rules).map_err(Failure::io("confining the container's devices"))?;
    if let Some(linux) = spec.linux_mut() {
        // Without limits libcontainer need not go through the controllers.
        linux.set_resources(resources.filter(|r| *r != LinuxResources::default()));
    }
    Ok(())
}

/// The user of a process of the container as the guest sees it.
pub fn owner_of_stdio(spec: &Spec, process: Option<&Process>) -> u32 {
    let uid = process.map_or(0, |p| p.user().uid());
    let mappings = spec
        .linux()
        .as_ref()
        .and_then(|l| l.uid_mappings().as_deref());
    namespaces::map_id(mappings, uid)
}

/// A session keyring of the container's own, inherited by its process; without it
/// containers would see each other's keys (runc's `--no-new-keyring` explains).
fn join_new_keyring(container_id: &str) -> Result<(), Failure> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    let name = format!("_ses.{container_id}\0");
    // SAFETY: the name ends with a NUL.
    let joined = sys::check(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr())
    });
    match joined {
        // A kernel without keys has none to protect.
        Err(e) if e.raw_os_error() != Some(libc::ENOSYS) => {
            Err(Failure::io::<io::Error>("making the session keyring")(e))
        }
        _ => Ok(()),
    }
}
