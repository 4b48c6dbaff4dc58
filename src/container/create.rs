//! `create`: from a bundle to a process that waits in a VM, its own or its pod's.
//!
//! The record is on disk before anything is made, and names whatever was made;
//! a step that fails removes it all through the same path as `delete --force`.
//! While the VM boots, everything the host has to do is done.

mod created;
mod in_guest;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_runv_protocol::hook;
use kuasar_runv_protocol::namespace::Kind;
use nix::pty::Winsize;
use nix::sched::CloneFlags;

use super::bundle::Bundle;
use super::cgroup::limits::Holds;
use super::cgroup::systemd::{Placeholder, Scope};
use super::console::Console;
use super::guest_spec::{self, Bind, GuestSpec};
use super::hooks::{self, Hooks};
use super::membership::{self, Membership};
use super::mount_options::Depth;
use super::pod;
use super::preserved::Preserved;
use super::resources::Resources;
use super::seccomp;
use super::state::{ContainerRecord, Phase, Status};
use super::terminal::{CallersTerminal, check_streams};
use super::{
    Error, cgroup, check_id, context, execs, guest_volumes, host_mounts, net_devices, served_cards,
    size,
};
use crate::config::Config;
use crate::root::{self, Root};
use crate::sandbox::Sandbox;
use crate::sandbox::control::monotonic_us;
use crate::standin::spawn::{self, Plan, StandIn, Volume};
use crate::sys::interrupt::Interrupt;
use crate::sys::mount as mounts;
use crate::sys::process::ProcessRef;
pub use created::Created;
use created::Undo;
use in_guest::{attach, create_in_guest, share};
pub(super) use in_guest::{stream_flags, wanted_streams};

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
    let cards = served_cards::of(&bundle.spec, &config.network)?;
    let (mut record, undo) = begin(root, options, &bundle, &hooks, cgroups, &membership)?;
    if record.has_network {
        // Otherwise they are those of the container whose network it shares.
        record.served_cards = cards;
    }
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
    let filter = guest.seccomp.as_ref().map(seccomp::compile).transpose()?;
    trace("host-ready");

    wait_for_guest(&sandbox, &config, interrupt.as_fd())?;
    if !guest.volumes.is_empty() {
        guest_volumes::note(root, &record.sandbox_id).map_err(context("noting volumes"))?;
    }
    let turn = pod::take_turn(root, &record)?;
    let (agent, streams) = create_in_guest(&sandbox, options, &parts, filter.as_ref())?;
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
            .map_err(|source| Error::ConsoleSocket {
                path: socket.clone(),
                source,
            })?;
    }
    if let Some(path) = &options.pid_file {
        crate::sys::atomic_file::write(path, standin.pid.to_string().as_bytes(), 0o644).map_err(
            |source| Error::PidFile {
                path: path.clone(),
                source,
            },
        )?;
    }
    let mut created = Created {
        agent,
        terminal,
        record,
        root: root.clone(),
        sandbox,
        standin,
        standin_ref,
        ends_machine: membership.is_alone(),
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
    // A machine of a template that does not come up is followed by one that is booted.
    let timeouts = &config.timeouts;
    let boot_deadline = timeouts.restore() + timeouts.boot(true) + SANDBOXER_MARGIN;
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
        let mut config = config.clone();
        // Programs cannot map the memory of a machine of a template.
        config.template.enabled &= record.served_cards.is_empty();
        let sandbox = Sandbox::boot(root, id, &config, cgroups, &demands, debug)?;
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
    let undo = Undo::new(root, &options.id, options.pid_file.as_deref(), lock);
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

/// The bundle of a command without `--bundle`: where the caller is.
#[must_use]
pub fn default_bundle() -> PathBuf {
    Path::new(".").to_owned()
}
