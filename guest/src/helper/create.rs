//! Creating a container, from the request to the waiting process.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::Spec;

use super::executor::Program;
use super::failure::{self, Failure};
use super::namespaces::Network;
use super::terminal::{self, ConsoleSocket};
use super::{INNER_ID, SPEC_FILE, namespaces, rootfs, spec};
use crate::cgroup::{Cgroup, devices};
use crate::sys;
use crate::zygote::CreateRequest;

/// A container whose process waits for the start.
pub struct CreatedContainer {
    /// Of its first process, in the guest's own pid namespace.
    pub pid: i32,
    /// Master of its terminal.
    pub terminal: Option<OwnedFd>,
}

/// Carries out a request. On failure the private directory and the cgroup are
/// left to the agent.
pub fn create(request: &CreateRequest, stdio: Vec<OwnedFd>) -> Result<CreatedContainer, Failure> {
    failure::start_collecting().map_err(Failure::io("memfd"))?;
    // This process ends by itself; taking the spec apart first would be work for
    // nothing.
    let mut spec = ManuallyDrop::new(spec::load(&request.dir.join(SPEC_FILE))?);
    let cgroup = Cgroup::of(&request.container_id);
    spec::normalise(&mut spec, &cgroup.path_in_hierarchy())?;
    let (env, terminal) = match spec.process() {
        Some(p) => (
            p.env().clone().unwrap_or_default(),
            p.terminal() == Some(true),
        ),
        None => (Vec::new(), false),
    };
    // The last entry is the placeholder of `normalise`.
    let env = env.split_last().map_or(&[][..], |(_, given)| given);

    rootfs::copy_up(&mut spec, &request.dir)?;
    let late_cwd = rootfs::make_cwd(&mut spec)?;
    prepare_cgroup(&cgroup, &spec)?;
    if !request.no_new_keyring {
        join_new_keyring(&request.container_id)?;
    }
    let uid = owner_of_stdio(&spec);
    let network = Network::of(spec.linux().as_ref());
    let _user_namespace = match spec.linux_mut() {
        Some(linux) => namespaces::make_user_namespace(linux)?,
        None => None,
    };
    let config = request.dir.join("config.json");
    spec.save(&config)
        .map_err(|e| Failure::Other(format!("writing {}: {e}", config.display())))?;

    let console = match terminal {
        true => Some(ConsoleSocket::new(&request.dir)?),
        false => None,
    };
    let program = Program::new(env, late_cwd);
    // With a terminal, the streams are its.
    let stdio = if terminal { Vec::new() } else { stdio };
    let pid = build(request, program, console.as_ref(), stdio, uid)?;
    let master = console.map(ConsoleSocket::receive).transpose()?;
    if let (Some(master), Some(process)) = (&master, spec.process()) {
        terminal::finish(master, process, uid)?;
    }
    network.bring_up_loopback(pid)?;
    Ok(CreatedContainer {
        pid,
        terminal: master,
    })
}

fn build(
    request: &CreateRequest,
    program: Program,
    console: Option<&ConsoleSocket>,
    stdio: Vec<OwnedFd>,
    uid: u32,
) -> Result<i32, Failure> {
    let invalid = |e| Failure::from_libcontainer(&e);
    let mut builder = ContainerBuilder::new(INNER_ID.to_owned(), SyscallType::Linux)
        .with_executor(program)
        .with_root_path(&request.dir)
        .map_err(invalid)?
        .with_console_socket(console.map(|c| &c.path));
    let mut streams = stdio.into_iter();
    for (number, announced) in request.stdio.into_iter().enumerate() {
        let Some(stream) = announced.then(|| streams.next()).flatten() else {
            continue;
        };
        terminal::give_to(&stream, uid).map_err(Failure::io("giving stdio to the user"))?;
        builder = match number {
            0 => builder.with_stdin(stream),
            1 => builder.with_stdout(stream),
            _ => builder.with_stderr(stream),
        };
    }
    let container = ManuallyDrop::new(
        builder
            .as_init(&request.dir)
            .with_systemd(false)
            .with_detach(true)
            .with_no_pivot(request.no_pivot)
            .build()
            .map_err(invalid)?,
    );
    container
        .pid()
        .map(nix::unistd::Pid::as_raw)
        .ok_or_else(|| Failure::Other("the container's process has no pid".to_owned()))
}

/// Makes the cgroup and confines its devices. libcontainer finds it and only
/// sets the limits: it has no device rules without a BPF library.
fn prepare_cgroup(cgroup: &Cgroup, spec: &Spec) -> Result<(), Failure> {
    cgroup.create().map_err(Failure::io("making the cgroup"))?;
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    if let Some(memory) = resources.and_then(|r| r.memory().as_ref()) {
        // The sum of memory and swap in the spec, swap alone in cgroup v2.
        // libcgroups takes the difference for "not set" when it is zero.
        let no_swap = memory.limit().is_some_and(|l| l > 0) && memory.limit() == memory.swap();
        if no_swap {
            cgroup
                .forbid_swap()
                .map_err(Failure::io("forbidding swap"))?;
        }
    }
    let rules = resources
        .and_then(|r| r.devices().as_deref())
        .unwrap_or_default();
    let rules = devices::rules(rules).map_err(|e| Failure::invalid(e.to_string()))?;
    devices::attach(cgroup, &rules).map_err(Failure::io("confining the container's devices"))
}

/// The container's user as the guest sees it.
fn owner_of_stdio(spec: &Spec) -> u32 {
    let uid = spec.process().as_ref().map_or(0, |p| p.user().uid());
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
