//! The sandboxer: the resident process of one pod.
//!
//! It owns the VM (the hypervisor is its child and dies with it), serves the
//! VM's vsock and virtio-fs devices from threads of its own, keeps the shared
//! directory in a private mount namespace, and answers the commands. One
//! poll(2) loop; it ends when the VM ends, and the VM ends when it does.
//!
//! It holds no descriptor of its caller (containerd hands its listening socket
//! to the runtime, and waits for the end of the pipes it gave it).

mod again;
mod agent;
mod clients;
mod clock;
#[cfg(any(test, fuzzing))]
#[allow(clippy::expect_used, reason = "a fuzz target fails by panicking")]
pub mod fuzzing;
mod identity;
pub(super) mod machine;
mod network;
mod oom;
mod privileges;
mod sockets;
mod spawn;
mod subscribers;
mod volumes;

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kuasar_runv_protocol::{EVENT_PORT, GUEST_CID};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::again::Spare;
use self::agent::AgentEvents;
use self::clients::Client;
use self::clock::ClockWatch;
use self::identity::Offer;
use self::network::Network;
use self::oom::OomReports;
use self::sockets::HostSockets;
use super::control::{self, Listener, ReadyInfo, Reply, Resized, SandboxerConfig, monotonic_us};
use super::guest_volumes::GuestVolumes;
use super::record::SandboxRecord;
use super::share::Share;
use super::size::{self, Demands};
use super::{CONTROL_SOCKET, VSOCK_SOCKET};
use crate::root::Root;
use crate::sys::process::ProcessRef;
use crate::sys::seqpacket::Channel;
use crate::sys::trim;
use crate::sys::unix_socket;
use crate::vm::{self, BackEnds, Served, Vm};

pub use spawn::spawn;

/// The sandboxer's name on the hidden command line.
pub const COMMAND: &str = "sandboxer";
const CHANNEL_FD: i32 = 3;

/// How long the creator may take to send the configuration, and to ask why the
/// VM could not be started.
const CREATOR_DEADLINE: Duration = Duration::from_secs(30);
/// How long a VM may go on after its hypervisor has let go of a device, which it
/// does when it ends.
const DEVICE_GRACE: Duration = Duration::from_secs(5);
/// After so long without anything to do it gives memory back that it may need again.
const QUIET: Duration = Duration::from_secs(5);

/// Runs a sandboxer until its VM ends; the return value is the exit code.
pub fn main() -> u8 {
    let start_us = monotonic_us();
    // SAFETY: `spawn` has put the channel there, and nothing else in this
    // process knows of it.
    let channel = Channel::from(unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) });
    let config: SandboxerConfig = match channel.recv(CREATOR_DEADLINE) {
        Ok(Some(message)) => match control::decode(&message) {
            Ok(config) => config,
            Err(_) => return 1,
        },
        // The creator died before it recorded this process.
        _ => return 1,
    };
    crate::logging::init_sandboxer(config.debug);
    let started = privileges::start()
        .map_err(context("giving up capabilities"))
        .and_then(|()| Sandboxer::start(&config, start_us));
    match started {
        Ok(sandboxer) => sandboxer.run(channel),
        Err(e) => {
            log::error!("{e}");
            explain(&channel, &e.to_string());
            1
        }
    }
}

/// Answers the creator's next request with the reason why there is no VM.
fn explain(channel: &Channel, reason: &str) {
    if let Ok(Some(_)) = channel.recv(CREATOR_DEADLINE) {
        let reply = Reply {
            error: Some(reason.to_owned()),
            ..Reply::default()
        };
        // The creator may be gone; the log has the reason too.
        let _ = control::reply(channel, &reply);
    }
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{context}: {source}")]
    Io {
        context: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Vm(#[from] vm::Error),
    #[error(transparent)]
    Size(#[from] size::Error),
    #[error("reading the record: {0}")]
    Record(#[from] crate::container::state::RecordError),
}

fn context(context: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { context, source }
}

/// Where the boot stands.
enum Boot {
    Running { deadline: Instant },
    Ready(ReadyInfo),
}

struct Sandboxer {
    vm: Box<dyn Vm>,
    size: Resized,
    demands: Demands,
    share: Share,
    volumes: GuestVolumes,
    sockets: HostSockets,
    listener: Listener,
    /// Takes the agent's one connection, before any container runs.
    event_listener: Option<UnixListener>,
    agent: Option<AgentEvents>,
    /// What a machine of a template gets first, until its agent is ready.
    identity: Option<Offer>,
    /// What is booted when that does not get ready.
    spare: Option<Spare>,
    clock: ClockWatch,
    boot: Boot,
    start_us: u64,
    vmm_start_us: u64,
    clients: Vec<Client>,
    network: Network,
    oom: OomReports,
    root: Root,
    dir: PathBuf,
    stop_deadline: Duration,
    /// Those that still have something to say.
    devices: Vec<Served>,
    /// When the VM has to have ended by itself, once its end has begun.
    vm_ends_by: Option<Instant>,
    /// The process whose end is that of the VM, if nobody else uses it.
    last: Option<OwnedFd>,
    /// When memory is given back, unless something happens before.
    trims_at: Option<Instant>,
}

impl Sandboxer {
    fn start(config: &SandboxerConfig, start_us: u64) -> Result<Sandboxer, Error> {
        let root = Root::new(Some(config.root.clone()));
        let dir = root.sandbox(&config.id);
        let dir_fd =
            unix_socket::open_dir(&dir).map_err(context("opening the sandbox directory"))?;
        let bind = |name: &str| {
            unix_socket::bind(dir_fd.as_fd(), name).map_err(context("making a socket"))
        };
        let event_listener = bind(&format!("{VSOCK_SOCKET}_{EVENT_PORT}"))?;
        let known = Root::of_machine().map_err(context("the directory for what is detected"))?;
        let share = Share::create(dir.join("share"), &[&known, &dir])
            .map_err(context("the shared directory"))?;
        let size = config.demands.size()?;
        let most = config.demands.bounds().most;
        let vm_config = machine::vm_config(&config.config, size, most, &dir);
        let mut machine = vm::create(&config.config, vm_config.clone(), &known)?;
        let mut demands = config.demands.clone();
        demands.bound(machine::most(&*machine, size, demands.bounds().most));

        let vmm_start_us = monotonic_us();
        log::debug!("trace vmm-start {vmm_start_us}");
        let mut record = SandboxRecord::read(&root, &config.id)?;
        machine.boot(&mut |pid| {
            record.vm = Some(ProcessRef::of(pid)?);
            record.most = Some(demands.bounds().most);
            record.write(&root).map_err(io::Error::other)
        })?;
        let shared = unix_socket::open_dir(share.dir()).map_err(context("the shared directory"))?;
        let listener =
            Listener::bind(dir_fd.as_fd(), CONTROL_SOCKET).map_err(context("making a socket"))?;
        let sockets = HostSockets::new(dir_fd.try_clone().map_err(context("a descriptor"))?);
        let devices = machine.serve(BackEnds {
            sockets: dir_fd,
            guest_cid: GUEST_CID.into(),
            shared,
        })?;
        let is_restored = machine.is_restored();
        let (identity, spare) = match is_restored {
            true => {
                let offer = Offer::make(&dir).map_err(context("the machine's identity"))?;
                let spare = Spare::new(&config.config, vm_config, known);
                (Some(offer), Some(spare))
            }
            false => (None, None),
        };
        let network = Network::new(config).map_err(context("an event descriptor"))?;
        let timeouts = &config.config.timeouts;
        let timeout = match is_restored {
            true => timeouts.restore(),
            false => timeouts.boot(machine.capabilities().emulated),
        };
        let sandboxer = Sandboxer {
            vm: machine,
            size: Resized {
                booted: size,
                now: size,
            },
            demands,
            share,
            volumes: GuestVolumes::default(),
            sockets,
            listener,
            event_listener: Some(event_listener),
            agent: None,
            identity,
            spare,
            clock: ClockWatch::new().map_err(context("watching the clock"))?,
            boot: Boot::Running {
                deadline: Instant::now() + timeout,
            },
            start_us,
            vmm_start_us,
            clients: Vec::new(),
            network,
            oom: OomReports::new(config).map_err(context("an event descriptor"))?,
            root,
            dir,
            stop_deadline: config.config.timeouts.stop(),
            devices,
            vm_ends_by: None,
            last: None,
            trims_at: None,
        };
        if !is_restored {
            sandboxer.has_booted(&config.config)?;
        }
        Ok(sandboxer)
    }

    fn run(mut self, creator: Channel) -> u8 {
        self.clients.push(Client {
            channel: creator,
            is_creator: true,
            waits_for_boot: false,
            waits_for_removal: None,
            waits_for_network: None,
            listens_to: None,
        });
        let code = loop {
            let ended = match self.step() {
                Err(End::Failed(reason)) => match self.boot_instead(&reason) {
                    Ok(true) => Ok(()),
                    Ok(false) => Err(End::Failed(reason)),
                    Err(e) => Err(End::Failed(format!("{reason}, and then: {e}"))),
                },
                ended => ended,
            };
            match ended {
                Ok(()) => {}
                Err(End::Quietly) => break 0,
                Err(End::Failed(reason)) => {
                    log::error!("{reason}");
                    self.answer_waiting(&Reply {
                        error: Some(reason),
                        ..Reply::default()
                    });
                    break 1;
                }
            }
        };
        if let Err(e) = self.vm.stop(self.stop_deadline) {
            log::error!("stopping the virtual machine: {e}");
        }
        code
    }

    /// Waits for something to happen and deals with it.
    fn step(&mut self) -> Result<(), End> {
        let ready = self.wait().map_err(|e| End::Failed(format!("poll: {e}")))?;
        if ready.any {
            self.trims_at = Some(Instant::now() + QUIET);
        }
        if ready.vm {
            self.vm_events()?;
        }
        for index in ready.devices.into_iter().rev() {
            self.device_event(index)?;
        }
        if ready.network {
            self.network_messages();
        }
        if ready.oom {
            self.oom_reports();
        }
        if ready.event_listener {
            self.accept_agent();
        }
        if ready.identity {
            self.identity_is_answered()?;
        }
        if ready.agent {
            self.agent_events()?;
        }
        // After what the guest has said before that.
        if ready.last {
            self.last_has_ended()?;
        }
        if ready.clock {
            self.clock_is_due();
        }
        if ready.listener {
            self.accept_client();
        }
        // From the back, because a client that is done is removed.
        for index in ready.clients.into_iter().rev() {
            self.serve(index)?;
        }
        self.check_deadlines()
    }

    fn check_deadlines(&mut self) -> Result<(), End> {
        let now = Instant::now();
        if self.trims_at.is_some_and(|at| now >= at) {
            self.trims_at = None;
            trim::heap();
            trim::code_and_constants();
        }
        if let Boot::Running { deadline } = self.boot
            && now >= deadline
        {
            return Err(End::Failed(format!(
                "the guest's agent was not ready in time{}",
                machine::console_tail(&self.dir)
            )));
        }
        if self.vm_ends_by.is_some_and(|deadline| now >= deadline) {
            return Err(End::Failed(
                "the hypervisor has let go of a device and does not end".into(),
            ));
        }
        Ok(())
    }

    /// How long there is to wait for what has a deadline.
    fn time_left(&self) -> Option<Timespec> {
        let boot = match self.boot {
            Boot::Running { deadline } => Some(deadline),
            Boot::Ready(_) => None,
        };
        let deadlines = [boot, self.vm_ends_by, self.trims_at];
        let deadline = deadlines.into_iter().flatten().min()?;
        let left = deadline.saturating_duration_since(Instant::now());
        Some(Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        })
    }

    fn wait(&self) -> io::Result<ReadyFds> {
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.vm.event_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.network.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.clock.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.oom.as_fd(), PollFlags::IN),
        ];
        let event_listener = self.event_listener.as_ref().map(|l| {
            fds.push(PollFd::from_borrowed_fd(l.as_fd(), PollFlags::IN));
            fds.len() - 1
        });
        let agent = self.agent.as_ref().map(|a| {
            fds.push(PollFd::from_borrowed_fd(a.stream.as_fd(), PollFlags::IN));
            fds.len() - 1
        });
        let identity = self.identity.as_ref().and_then(Offer::fd).map(|fd| {
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
            fds.len() - 1
        });
        let last = self.last.as_ref().map(|fd| {
            fds.push(PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
            fds.len() - 1
        });
        let first_client = fds.len();
        for client in &self.clients {
            fds.push(PollFd::from_borrowed_fd(
                client.channel.as_fd(),
                PollFlags::IN,
            ));
        }
        let first_device = fds.len();
        for device in &self.devices {
            fds.push(PollFd::from_borrowed_fd(
                device.handle.as_fd(),
                PollFlags::IN,
            ));
        }
        let timeout = self.time_left();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let any = fds.iter().any(|fd| !fd.revents().is_empty());
        let is_ready = |index: usize| !fds[index].revents().is_empty();
        Ok(ReadyFds {
            any,
            vm: is_ready(0),
            listener: is_ready(1),
            network: is_ready(2),
            clock: is_ready(3),
            oom: is_ready(4),
            event_listener: event_listener.is_some_and(is_ready),
            agent: agent.is_some_and(is_ready),
            identity: identity.is_some_and(is_ready),
            last: last.is_some_and(is_ready),
            clients: (0..self.clients.len())
                .filter(|index| is_ready(first_client + index))
                .collect(),
            devices: (0..self.devices.len())
                .filter(|index| is_ready(first_device + index))
                .collect(),
        })
    }
}

/// Why the loop ends.
enum End {
    Quietly,
    Failed(String),
}

struct ReadyFds {
    any: bool,
    vm: bool,
    listener: bool,
    network: bool,
    clock: bool,
    oom: bool,
    event_listener: bool,
    agent: bool,
    identity: bool,
    last: bool,
    clients: Vec<usize>,
    devices: Vec<usize>,
}
