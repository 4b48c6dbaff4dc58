//! `create`: from a bundle to a process that waits in a VM, its own or its pod's.
//!
//! The record is on disk before anything is made, and names whatever was made;
//! a step that fails removes it all through the same path as `delete --force`.
//! While the VM boots, everything the host has to do is done.

use std::borrow::Cow;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_runv_protocol::agent::{CreateContainerRequest, NamespaceJoin};
use kuasar_runv_protocol::hook;
use kuasar_runv_protocol::namespace::Kind;
use nix::pty::Winsize;
use nix::sched::CloneFlags;

use super::bundle::Bundle;
use super::cgroup::limits::Holds;
use super::cgroup::systemd::{Placeholder, Scope};
use super::console::Console;
use super::guest_spec::{self, Bind, GuestSpec, ROOTFS};
use super::hooks::{self, Hooks};
use super::membership::{self, Membership};
use super::mount_options::Depth;
use super::pod::{self, Unreachable};
use super::preserved::Preserved;
use super::resources::Resources;
use super::state::{ContainerRecord, Phase, Status};
use super::terminal::{CallersTerminal, check_streams};
use super::{
    Error, cgroup, check_id, context, delete, execs, guest_volumes, host_mounts, net_devices,
    network, size,
};
use crate::agent_client::streams::{self, Wanted};
use crate::agent_client::{self, Agent};
use crate::config::Config;
use crate::root::{self, Root};
use crate::sandbox::control::monotonic_us;
use crate::sandbox::{Guest, Sandbox};
use crate::standin::spawn::{self, Plan, StandIn, Volume};
use crate::standin::{ATTACHED, HAS_STDERR, HAS_STDIN, HAS_STDOUT, TERMINAL};
use crate::sys::interrupt::Interrupt;
use crate::sys::lock::DirLock;
use crate::sys::mount as mounts;
use crate::sys::process::ProcessRef;

/// The sandboxer reports a boot that takes too long; this is for a sandboxer
/// that does not even do that.
const SANDBOXER_MARGIN: Duration = Duration::from_secs(30);

/// What `create` and `run` are told on the command line.
#[derive(Debug)]
pub struct Options {
    pub id: String,
    pub bundle: PathBuf,
    pub pid_file: Option<PathBuf>,
    pub console_socket: Option<PathBuf>,
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    pub preserve_fds: u32,
    /// The caller stays and has the container's stdio (`run` without `-d`).
    pub foreground: bool,
    pub systemd_cgroup: bool,
    pub debug: bool,
}

/// A created container, still locked. Unless [`keep`](Created::keep) is called,
/// dropping it removes the container.
pub struct Created {
    pub agent: Agent,
    /// Where the container's terminal is to be shown, if it has one and the
    /// caller stays.
    pub terminal: Option<CallersTerminal>,
    record: ContainerRecord,
    root: Root,
    sandbox: Sandbox,
    standin: StandIn,
    standin_ref: ProcessRef,
    undo: Undo,
    // Behind `undo`: who is interrupted cleans up first.
    interrupt: Interrupt,
}

impl Created {
    /// Lets the container outlive this process.
    ///
    /// # Errors
    /// When its processes have ended meanwhile, or this one was interrupted.
    pub fn keep(self) -> Result<(), Error> {
        self.check_interrupted()?;
        self.keep_attached().map(drop)
    }

    /// # Errors
    /// When a signal asked this process to give up.
    pub fn check_interrupted(&self) -> Result<(), Error> {
        match self.interrupt.has_come() {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    /// Lets the container outlive this process, even when a signal has come: once
    /// the program runs, the signals are meant for it. A stand-in with a terminal
    /// ends its use of this process's terminal when the value is dropped.
    ///
    /// # Errors
    /// When its processes have ended meanwhile.
    pub fn keep_attached(self) -> Result<StandIn, Error> {
        self.sandbox.commit()?;
        self.standin.commit()?;
        self.undo.disarm();
        // What comes now comes too late: the container exists.
        self.interrupt.ignore();
        Ok(self.standin)
    }

    /// Gives the container its network; before its program starts.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn connect_network(&self) -> Result<(), Error> {
        network::connect(&self.sandbox, &self.record)
    }

    /// Runs the hooks that follow the start of the program.
    ///
    /// # Errors
    /// Of the first that fails; the container is to be dropped then.
    pub fn poststart(&self) -> Result<(), Error> {
        let state = hooks::State::of(&self.record, Status::Running);
        hooks::run(&self.record.hooks.poststart, &state, None, None).map_err(Error::Hook)
    }

    #[must_use]
    pub fn standin(&self) -> ProcessRef {
        self.standin_ref
    }

    /// Writes how far it got to the record.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn record_phase(&mut self, phase: Phase) -> Result<(), Error> {
        self.record.phase = phase;
        Ok(self.record.write(&self.root)?)
    }
}

/// Removes a half-made container when dropped.
struct Undo {
    root: Root,
    id: String,
    pid_file: Option<PathBuf>,
    armed: bool,
    _lock: DirLock,
}

impl Undo {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let Some(path) = &self.pid_file {
            // It may not have been written yet.
            let _ = fs::remove_file(path);
        }
        if let Err(e) = delete::destroy(&self.root, &self.id, Unreachable::IsLeftBehind) {
            log::warn!("cleaning up after a failed create: {e}");
        }
    }
}

/// Creates a container.
///
/// # Errors
/// See [`Error`]; nothing is left behind.
pub fn create(root: &Root, options: &Options) -> Result<Created, Error> {
    trace("create-begin");
    let interrupt = Interrupt::new().map_err(context("signalfd"))?;
    check_id(&options.id)?;
    let preserved = Preserved::take(options.preserve_fds, true)?;
    let mut bundle = Bundle::load(&options.bundle)?;
    host_mounts::prepare(&mut bundle)?;
    let mut guest = guest_spec::translate(&bundle, &options.id)?;
    check_streams(
        has_terminal(&bundle),
        !options.foreground,
        options.console_socket.is_some(),
    )?;
    let terminal = match has_terminal(&bundle) && options.foreground {
        true => Some(CallersTerminal::take(&mut guest.json["process"])?),
        false => None,
    };
    preserved.announce(&mut guest.json["process"]);
    let membership = membership::resolve(root, &options.id, &bundle.spec)?;
    let config = Config::load()?;
    let cgroups_path = bundle
        .spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.cgroups_path().as_deref());
    let scope = options
        .systemd_cgroup
        .then(|| Scope::parse(cgroups_path, &options.id))
        .transpose()?;
    let cgroups = cgroup::directories(cgroups_path, &options.id, scope.as_ref())?;

    let hooks = Hooks::of(&bundle.spec);
    let (mut record, undo) = begin(root, options, &bundle, &hooks, cgroups, &membership)?;
    let _held = match scope {
        Some(scope) => Some(start_scope(&mut record, root, scope)?),
        None => None,
    };
    cgroup::create(&record.cgroups)?;
    let (sandbox, holds) = enter_sandbox(root, &record, &config, options.debug)?;
    trace("sandboxer-spawned");
    let (console, slave) = open_console(options, &bundle)?;
    let parts = Parts {
        bundle: &bundle,
        guest: &guest,
        hooks: &hooks,
        membership: &membership,
        preserved: &preserved,
    };
    let standin = spawn_standin(&parts, &record, root, slave)?;
    let standin_ref = ProcessRef::of(standin.pid).map_err(context("the stand-in"))?;
    record.standin = Some(standin_ref);
    record.write(root)?;
    standin.release()?;
    let in_order = hooks.run_before_guest() || net_devices::are_wanted(&bundle.spec);
    if !in_order {
        // Nothing has to wait for it: it sets itself up while the guest works.
        standin.enter_rootfs()?;
    }
    share(&sandbox, options, &bundle, &guest)?;
    if in_order {
        standin.wait_mounted()?;
        net_devices::give(&bundle.spec, &record)?;
        run_hooks(&record, &hooks, interrupt.as_fd())?;
        standin.enter_rootfs()?;
        standin.wait_entered(hooks.create_container_time(), interrupt.as_fd())?;
    }
    trace("host-ready");

    wait_for_guest(&sandbox, &config, interrupt.as_fd())?;
    if !guest.volumes.is_empty() {
        guest_volumes::note(root, &record.sandbox_id).map_err(context("noting volumes"))?;
    }
    let turn = pod::take_turn(root, &record)?;
    let (agent, streams) = create_in_guest(&sandbox, options, &parts)?;
    drop(turn);
    trace("guest-created");
    // Not before: they are meant for the container, not for the boot.
    cgroup::limits::apply(&record.cgroups, &record.resources, holds);
    if !in_order {
        standin.wait_mounted()?;
        standin.wait_entered(Some(Duration::ZERO), interrupt.as_fd())?;
    }
    attach(&standin, options, &parts, &streams)?;
    drop(streams);
    // The stand-in has them; their other ends are to see when it closes them.
    drop(preserved);
    trace("standin-attached");

    if let (Some(console), Some(socket)) = (console, &options.console_socket) {
        console
            .send(socket)
            .map_err(context(format!("console socket {}", socket.display())))?;
    }
    if let Some(path) = &options.pid_file {
        crate::sys::atomic_file::write(path, standin.pid.to_string().as_bytes(), 0o644)
            .map_err(context(format!("writing the pid file {}", path.display())))?;
    }
    let mut created = Created {
        agent,
        terminal,
        record,
        root: root.clone(),
        sandbox,
        standin,
        standin_ref,
        undo,
        interrupt,
    };
    created.record_phase(Phase::Created)?;
    trace("create-end");
    Ok(created)
}

/// Puts the scope on record, then has systemd make it.
fn start_scope(
    record: &mut ContainerRecord,
    root: &Root,
    scope: Scope,
) -> Result<Placeholder, Error> {
    record.scope = Some(scope.clone());
    record.write(root)?;
    scope.start(&record.id, &record.resources)
}

/// Waits until the guest is ready to create containers.
fn wait_for_guest(
    sandbox: &Sandbox,
    config: &Config,
    interrupt: BorrowedFd<'_>,
) -> Result<(), Error> {
    let boot_deadline = config.timeouts.boot(true) + SANDBOXER_MARGIN;
    let ready = sandbox
        .wait_ready(boot_deadline, interrupt)?
        .ok_or(Error::Interrupted)?;
    log::debug!("trace vmm-start {}", ready.vmm_start_us);
    log::debug!("trace agent-ready {}", ready.agent_ready_us);
    log::debug!(
        "trace-guest agent-start {} agent-ready {} (us of the guest's clock)",
        ready.guest_agent_start_us,
        ready.guest_agent_ready_us
    );
    Ok(())
}

/// When a step was reached, for the break-down of `make bench`: microseconds of
/// `CLOCK_MONOTONIC`.
pub fn trace(step: &str) {
    log::debug!("trace {step} {}", monotonic_us());
}

fn has_terminal(bundle: &Bundle) -> bool {
    bundle
        .spec
        .process()
        .as_ref()
        .and_then(oci_spec::runtime::Process::terminal)
        .unwrap_or(false)
}

/// Boots a VM for the container, or connects to that of its pod, which grows for it.
fn enter_sandbox(
    root: &Root,
    record: &ContainerRecord,
    config: &Config,
    debug: bool,
) -> Result<(Sandbox, Holds), Error> {
    let Some(sandboxer) = record.member_of else {
        let demands = size::demands(&config.vm, record)?;
        let memory_mib = demands.size()?.memory_mib;
        let (id, cgroups) = (&record.sandbox_id, &record.cgroups);
        let sandbox = Sandbox::boot(root, id, config, cgroups, &demands, debug)?;
        return Ok((sandbox, Holds::Vm { memory_mib }));
    };
    let sandbox = Sandbox::join(root, &record.sandbox_id, sandboxer)?;
    pod::take_id(&sandbox, &record.id)?;
    sandbox.reserve(&record.id, size::of_limits(&record.resources))?;
    Ok((sandbox, Holds::StandIn))
}

/// Takes the id and puts the record on disk.
fn begin(
    root: &Root,
    options: &Options,
    bundle: &Bundle,
    hooks: &Hooks,
    cgroups: Vec<PathBuf>,
    membership: &Membership,
) -> Result<(ContainerRecord, Undo), Error> {
    root.create()
        .map_err(context(format!("making {}", root.path().display())))?;
    let dir = root.container(&options.id);
    root::create_private_dir(&dir).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists,
        _ => context(format!("making {}", dir.display()))(e),
    })?;
    // Whoever made the directory has the lock, unless `delete --force` of the
    // same id came in between and has already removed it.
    let lock = super::lock(root, &options.id)?;
    let pod = membership.pod.as_ref();
    let sandbox_id = pod.map_or(&options.id, |pod| &pod.sandbox_id);
    let mut record = ContainerRecord::new(&options.id, sandbox_id, &bundle.path)
        .map_err(context("making the record"))?;
    record.member_of = pod.map(|pod| pod.sandboxer);
    record.joins = membership
        .joins
        .iter()
        .map(|(kind, id)| (kind.name().to_owned(), id.clone()))
        .collect();
    record.oci_version.clone_from(bundle.spec.version());
    record.rootfs.clone_from(&bundle.rootfs);
    record.annotations = bundle
        .spec
        .annotations()
        .iter()
        .flatten()
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    record.cgroups = cgroups;
    record.has_network = !membership.joins.contains_key(&Kind::Network);
    record.network_path.clone_from(&membership.adopted_network);
    record.hooks = hooks.late.clone();
    record.resources = Resources::of_config(&bundle.json).map_err(super::bundle::Error::Json)?;
    let undo = Undo {
        root: root.clone(),
        id: options.id.clone(),
        pid_file: options.pid_file.clone(),
        armed: true,
        _lock: lock,
    };
    record.write(root)?;
    execs::prepare(root, &options.id)?;
    Ok((record, undo))
}

fn open_console(
    options: &Options,
    bundle: &Bundle,
) -> Result<(Option<Console>, Option<OwnedFd>), Error> {
    if !has_terminal(bundle) || options.foreground {
        return Ok((None, None));
    }
    let (console, slave) =
        Console::open(console_size(bundle)).map_err(context("making a terminal"))?;
    Ok((Some(console), Some(slave)))
}

fn console_size(bundle: &Bundle) -> Option<Winsize> {
    let size = bundle.spec.process().as_ref()?.console_size()?;
    Some(Winsize {
        ws_row: u16::try_from(size.height()).ok()?,
        ws_col: u16::try_from(size.width()).ok()?,
        ws_xpixel: 0,
        ws_ypixel: 0,
    })
}

/// What a stand-in is made from.
struct Parts<'a> {
    bundle: &'a Bundle,
    guest: &'a GuestSpec,
    hooks: &'a Hooks,
    membership: &'a Membership,
    preserved: &'a Preserved,
}

fn spawn_standin(
    parts: &Parts<'_>,
    record: &ContainerRecord,
    root: &Root,
    terminal: Option<OwnedFd>,
) -> Result<StandIn, Error> {
    let Parts {
        bundle,
        guest,
        hooks,
        membership,
        preserved: _,
    } = *parts;
    let mut volumes = Vec::new();
    for bind in &guest.binds {
        volumes.push(Volume {
            destination: bind.destination.clone(),
            tree: clone_bind(bind)?,
        });
    }
    let create_container = |pid: i32, stop: BorrowedFd<'_>| {
        let state = hooks::State::of(record, Status::Creating).with_pid(pid);
        hooks::run(&hooks.create_container, &state, None, Some(stop)).map_err(|e| e.to_string())
    };
    let has_hooks = !hooks.create_container.is_empty();
    let state_dir = root.container(&record.id);
    let standin = spawn::spawn(Plan {
        label: &record.id,
        // Hooks look for the container's mounts where its rootfs is.
        mount_point: if has_hooks {
            &bundle.rootfs
        } else {
            &state_dir
        },
        rootfs: clone_rootfs(bundle)?,
        volumes,
        cgroups: &record.cgroups,
        namespaces: membership
            .host
            .iter()
            .map(|(kind, namespace)| {
                let flag = CloneFlags::from_bits_retain(kind.flag());
                (flag, namespace.as_fd())
            })
            .collect(),
        hostname: bundle.spec.hostname().clone(),
        domainname: bundle.spec.domainname().clone(),
        sysctls: guest.sysctls.clone(),
        terminal,
        in_rootfs: has_hooks.then_some(&create_container),
    })?;
    Ok(standin)
}

/// The hooks that run on the host while the container is created.
fn run_hooks(
    record: &ContainerRecord,
    hooks: &Hooks,
    interrupt: BorrowedFd<'_>,
) -> Result<(), Error> {
    let state = hooks::State::of(record, Status::Creating);
    for list in [&hooks.prestart, &hooks.create_runtime] {
        hooks::run(list, &state, Some(&record.bundle), Some(interrupt)).map_err(|e| {
            match e.source {
                hook::Error::Stopped => Error::Interrupted,
                _ => Error::InitHook(e.to_string()),
            }
        })?;
    }
    Ok(())
}

fn clone_rootfs(bundle: &Bundle) -> Result<OwnedFd, Error> {
    mounts::clone_path(&bundle.rootfs, true).map_err(context(format!(
        "cloning the mount of {}",
        bundle.rootfs.display()
    )))
}

fn clone_bind(bind: &Bind) -> Result<OwnedFd, Error> {
    let failed = || context(format!("cloning the mount of {}", bind.source.display()));
    let tree = mounts::clone_path(&bind.source, bind.recursive).map_err(failed())?;
    if bind.private {
        mounts::set_private(tree.as_fd()).map_err(failed())?;
    }
    if let Some(depth) = bind.read_only {
        mounts::set_read_only(tree.as_fd(), depth == Depth::All).map_err(failed())?;
    }
    Ok(tree)
}

/// Puts rootfs and volumes into the pod's shared directory.
fn share(
    sandbox: &Sandbox,
    options: &Options,
    bundle: &Bundle,
    guest: &GuestSpec,
) -> Result<(), Error> {
    sandbox.share(&options.id, ROOTFS, clone_rootfs(bundle)?.as_fd())?;
    for bind in guest.binds.iter().filter(|bind| bind.is_shared) {
        let (tree, writes) = (clone_bind(bind)?, bind.read_only.is_none());
        sandbox.share_volume(&options.id, &bind.volume, writes, tree.as_fd())?;
    }
    Ok(())
}

/// Lets the agent create the container; the streams are for its stand-in.
fn create_in_guest(
    sandbox: &Sandbox,
    options: &Options,
    parts: &Parts<'_>,
) -> Result<(Agent, Vec<OwnedFd>), Error> {
    let Parts {
        bundle,
        guest,
        membership,
        preserved,
        ..
    } = *parts;
    let terminal = has_terminal(bundle);
    let wanted = wanted_streams(terminal).with_preserved(&preserved.relayed());
    let mut config = Cow::Borrowed(&guest.json);
    if !guest.volumes.is_empty() {
        guest_volumes::make(sandbox, &options.id, &guest.volumes, config.to_mut())?;
    }
    let request = CreateContainerRequest {
        container_id: options.id.clone(),
        spec_json: config.to_string().into_bytes(),
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
        no_pivot: options.no_pivot,
        no_new_keyring: options.no_new_keyring,
        plain_newlines: terminal && options.foreground,
        preserved: preserved.wanted(&options.id, ""),
        joins: joins(membership),
        shared_memory: guest.shared_memory.clone(),
        ..Default::default()
    };
    let _files = preserved.share(sandbox, &options.id, "")?;
    let mut created = ask_to_create(sandbox.guest(), &request, wanted);
    if matches!(&created, Err(Error::Agent(e)) if e.is_already_there()) {
        // Left behind by one that was deleted while the guest did not answer. The
        // streams go with it.
        pod::remove_from_guest(sandbox, &options.id)?;
        created = ask_to_create(sandbox.guest(), &request, wanted);
    }
    created.map_err(|e| match e {
        Error::Agent(agent_client::Error::Refused { message, .. }) => Error::Process(message),
        other => other,
    })
}

fn ask_to_create(
    guest: &Guest,
    request: &CreateContainerRequest,
    wanted: Wanted,
) -> Result<(Agent, Vec<OwnedFd>), Error> {
    // All connections at once; the agent waits for what belongs together.
    let agent = guest.start_agent()?;
    let opening = guest.start_streams(&request.container_id, "", wanted)?;
    let agent = guest.finish_agent(agent)?;
    agent.create_container(request).map_err(Error::Agent)?;
    Ok((agent, guest.finish_streams(opening)?))
}

/// Gives the streams to the stand-in.
fn attach(
    standin: &StandIn,
    options: &Options,
    parts: &Parts<'_>,
    streams: &[OwnedFd],
) -> Result<(), Error> {
    let terminal = has_terminal(parts.bundle);
    let mut flags = stream_flags(wanted_streams(terminal), terminal);
    if options.foreground {
        flags |= ATTACHED;
    }
    Ok(standin.attach(flags, streams, parts.preserved.relays())?)
}

fn joins(membership: &Membership) -> Vec<NamespaceJoin> {
    let join = |(kind, id): (&Kind, &String)| NamespaceJoin {
        type_: kind.name().to_owned(),
        container_id: id.clone(),
        ..Default::default()
    };
    membership.joins.iter().map(join).collect()
}

pub(super) fn wanted_streams(terminal: bool) -> Wanted {
    if terminal {
        return Wanted {
            stdin: true,
            stdout: true,
            stderr: false,
            preserved: 0,
        };
    }
    Wanted {
        stdin: streams::leads_somewhere(rustix::stdio::stdin()),
        stdout: streams::leads_somewhere(rustix::stdio::stdout()),
        stderr: streams::leads_somewhere(rustix::stdio::stderr()),
        preserved: 0,
    }
}

pub(super) fn stream_flags(wanted: Wanted, terminal: bool) -> u8 {
    let mut flags = 0;
    for (is_set, flag) in [
        (wanted.stdin, HAS_STDIN),
        (wanted.stdout, HAS_STDOUT),
        (wanted.stderr, HAS_STDERR),
        (terminal, TERMINAL),
    ] {
        if is_set {
            flags |= flag;
        }
    }
    flags
}

/// The bundle of a command without `--bundle`: where the caller is.
#[must_use]
pub fn default_bundle() -> PathBuf {
    Path::new(".").to_owned()
}
