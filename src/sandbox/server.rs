//! The sandboxer: the resident process of one pod.
//!
//! It owns the VM (the hypervisor is its child and dies with it), serves the
//! VM's vsock and virtio-fs devices from threads of its own, keeps the shared
//! directory in a private mount namespace, and answers the commands. One
//! poll(2) loop; it ends when the VM ends, and the VM ends when it does.
//!
//! It holds no descriptor of its caller (containerd hands its listening socket
//! to the runtime, and waits for the end of the pipes it gave it).

mod subscribers;

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kuasar_runv_protocol::agent::{Event, Ready};
use kuasar_runv_protocol::event::MAX_EVENT_LEN;
use kuasar_runv_protocol::{EVENT_PORT, GUEST_CID, PROTOCOL_VERSION, SHARE_TAG, cmdline};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::control::{
    self, Listener, Notice, ReadyInfo, Reply, Request, SandboxerConfig, monotonic_us,
};
use super::record::SandboxRecord;
use super::share::Share;
use super::{CONSOLE_LOG, CONTROL_SOCKET, LOG_FILE, VSOCK_SOCKET};
use crate::container::cgroup;
use crate::root::Root;
use crate::sys::process::{self, ProcessRef};
use crate::sys::seqpacket::{Channel, Message};
use crate::sys::unix_socket;
use crate::vm::devices::{self, fs, vsock};
use crate::vm::{self, FsDevice, Vm, VmConfig, VmEvent, VmSize};

/// The sandboxer's name on the hidden command line.
pub const COMMAND: &str = "sandboxer";
const CHANNEL_FD: i32 = 3;

const VSOCK_VHOST_SOCKET: &str = "vsock-vhost.sock";
const FS_VHOST_SOCKET: &str = "fs-vhost.sock";

/// How long the creator may take to send the configuration, and to ask why the
/// VM could not be started.
const CREATOR_DEADLINE: Duration = Duration::from_secs(30);
/// Commands connected at the same time; each is short.
const MAX_CLIENTS: usize = 64;

/// Starts a sandboxer that waits for its configuration on `channel`.
///
/// # Errors
/// As fork(2) and exec(2), or when it cannot be put into the cgroups.
pub fn spawn(channel: BorrowedFd<'_>, dir: &Path, cgroups: &[PathBuf]) -> io::Result<i32> {
    let log = std::fs::File::create(dir.join(LOG_FILE))?;
    let channel = channel.as_raw_fd();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("kuasar-runv")
        .arg(COMMAND)
        .arg(dir.file_name().unwrap_or_default())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    // SAFETY: setsid, dup2 and close_range are async-signal-safe and allocate
    // nothing.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            if channel == CHANNEL_FD {
                nix::fcntl::fcntl(
                    channel,
                    nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
                )?;
            } else {
                nix::unistd::dup2(channel, CHANNEL_FD)?;
            }
            process::close_on_exec_from(CHANNEL_FD + 1)
        });
    }
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    cgroup::join(cgroups, pid)?;
    Ok(pid)
}

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
    match Sandboxer::start(&config, start_us) {
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
    share: Share,
    listener: Listener,
    /// Takes the agent's one connection, before any container runs.
    event_listener: Option<UnixListener>,
    agent: Option<AgentEvents>,
    boot: Boot,
    start_us: u64,
    vmm_start_us: u64,
    clients: Vec<Client>,
    dir: PathBuf,
    stop_deadline: Duration,
    _devices: [devices::vhost_user::Handle; 2],
}

/// A command.
struct Client {
    channel: Channel,
    /// It boots this VM: until it commits, its end is the end of the VM.
    is_creator: bool,
    waits_for_boot: bool,
    /// The container whose notices it gets.
    listens_to: Option<String>,
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
        let vsock_vhost = bind(VSOCK_VHOST_SOCKET)?;
        let fs_vhost = bind(FS_VHOST_SOCKET)?;
        let event_listener = bind(&format!("{VSOCK_SOCKET}_{EVENT_PORT}"))?;
        let known = Root::of_machine().map_err(context("the directory for what is detected"))?;
        let mut machine = vm::create(&config.config, vm_config(config, &dir), &known)?;
        let share = Share::create(dir.join("share")).map_err(context("the shared directory"))?;

        let vmm_start_us = monotonic_us();
        let mut record = SandboxRecord::read(&root, &config.id)?;
        machine.boot(&mut |pid| {
            record.vm = Some(ProcessRef::of(pid)?);
            record.write(&root).map_err(io::Error::other)
        })?;
        let shared = unix_socket::open_dir(share.dir()).map_err(context("the shared directory"))?;
        let fs = fs::spawn(fs_vhost, shared).map_err(context("the virtio-fs device"))?;
        let listener =
            Listener::bind(dir_fd.as_fd(), CONTROL_SOCKET).map_err(context("making a socket"))?;
        let vsock = vsock::spawn(vsock_vhost, dir_fd, u64::from(GUEST_CID))
            .map_err(context("the vsock device"))?;
        let timeout = config.config.timeouts.boot(machine.capabilities().emulated);
        Ok(Sandboxer {
            vm: machine,
            share,
            listener,
            event_listener: Some(event_listener),
            agent: None,
            boot: Boot::Running {
                deadline: Instant::now() + timeout,
            },
            start_us,
            vmm_start_us,
            clients: Vec::new(),
            dir,
            stop_deadline: config.config.timeouts.stop(),
            _devices: [vsock, fs],
        })
    }

    fn run(mut self, creator: Channel) -> u8 {
        self.clients.push(Client {
            channel: creator,
            is_creator: true,
            waits_for_boot: false,
            listens_to: None,
        });
        let code = loop {
            match self.step() {
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
        if ready.vm {
            self.vm_events()?;
        }
        if ready.event_listener {
            self.accept_agent();
        }
        if ready.agent {
            self.agent_events()?;
        }
        if ready.listener {
            self.accept_client();
        }
        // From the back, because a client that is done is removed.
        for index in ready.clients.into_iter().rev() {
            self.serve(index)?;
        }
        match self.boot {
            Boot::Running { deadline } if Instant::now() >= deadline => Err(End::Failed(format!(
                "the guest's agent was not ready in time{}",
                console_tail(&self.dir)
            ))),
            _ => Ok(()),
        }
    }

    fn wait(&self) -> io::Result<ReadyFds> {
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.vm.event_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
        ];
        let event_listener = self.event_listener.as_ref().map(|l| {
            fds.push(PollFd::from_borrowed_fd(l.as_fd(), PollFlags::IN));
            fds.len() - 1
        });
        let agent = self.agent.as_ref().map(|a| {
            fds.push(PollFd::from_borrowed_fd(a.stream.as_fd(), PollFlags::IN));
            fds.len() - 1
        });
        let first_client = fds.len();
        for client in &self.clients {
            fds.push(PollFd::from_borrowed_fd(
                client.channel.as_fd(),
                PollFlags::IN,
            ));
        }
        let timeout = match self.boot {
            Boot::Running { deadline } => {
                let left = deadline.saturating_duration_since(Instant::now());
                Some(Timespec {
                    tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: left.subsec_nanos().into(),
                })
            }
            Boot::Ready(_) => None,
        };
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let is_ready = |index: usize| !fds[index].revents().is_empty();
        Ok(ReadyFds {
            vm: is_ready(0),
            listener: is_ready(1),
            event_listener: event_listener.is_some_and(is_ready),
            agent: agent.is_some_and(is_ready),
            clients: (0..self.clients.len())
                .filter(|index| is_ready(first_client + index))
                .collect(),
        })
    }

    fn vm_events(&mut self) -> Result<(), End> {
        loop {
            match self.vm.next_event() {
                Ok(None) => return Ok(()),
                Ok(Some(event)) => {
                    log::info!("virtual machine: {event:?}");
                    match event {
                        VmEvent::Exited(exit) => {
                            let why = exit.message.map_or_else(
                                || format!("it ended with {}", exit.status),
                                |message| format!("{message} ({})", exit.status),
                            );
                            return Err(End::Failed(format!(
                                "{}: {why}{}",
                                self.vm.hypervisor(),
                                console_tail(&self.dir)
                            )));
                        }
                        VmEvent::Stalled { reason } => return Err(End::Failed(reason)),
                        // The end of the hypervisor follows.
                        VmEvent::GuestShutdown | VmEvent::GuestReset | VmEvent::GuestPanicked => {}
                    }
                }
                Err(e) => log::warn!("virtual machine: {e}"),
            }
        }
    }

    fn accept_agent(&mut self) {
        let Some(listener) = &self.event_listener else {
            return;
        };
        let accepted = listener.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        });
        match accepted {
            Ok(stream) => {
                self.agent = Some(AgentEvents {
                    stream,
                    buffer: Vec::new(),
                });
                // Containers can open vsock connections too: only the first one,
                // made before there is any, is the agent's.
                self.event_listener = None;
                let socket = self.dir.join(format!("{VSOCK_SOCKET}_{EVENT_PORT}"));
                if let Err(e) = std::fs::remove_file(&socket) {
                    log::warn!("removing {}: {e}", socket.display());
                }
            }
            Err(e) => log::warn!("the agent's connection: {e}"),
        }
    }

    fn agent_events(&mut self) -> Result<(), End> {
        let Some(agent) = &mut self.agent else {
            return Ok(());
        };
        let events = match agent.receive() {
            Ok(events) => events,
            Err(e) => {
                log::info!("the agent's event connection: {e}");
                self.agent = None;
                return Ok(());
            }
        };
        for event in events {
            if event.has_ready() && matches!(self.boot, Boot::Running { .. }) {
                self.agent_is_ready(event.ready())?;
            } else if event.has_oom() {
                self.notify(&event.oom().container_id, Notice::Oom);
            } else if event.has_exited() && event.exited().exec_id.is_empty() {
                self.notify(&event.exited().container_id, Notice::Ended);
            } else if event.has_exited() {
                log::debug!("trace-guest exec {}", event.exited().exec_us);
            }
        }
        Ok(())
    }

    fn agent_is_ready(&mut self, ready: &Ready) -> Result<(), End> {
        if ready.protocol_version != PROTOCOL_VERSION {
            return Err(End::Failed(format!(
                "the guest image speaks version {} of the protocol, this kuasar-runv {PROTOCOL_VERSION}: build the image anew",
                ready.protocol_version
            )));
        }
        let info = ReadyInfo {
            sandboxer_start_us: self.start_us,
            vmm_start_us: self.vmm_start_us,
            agent_ready_us: monotonic_us(),
            guest_agent_start_us: ready.agent_start_us,
            guest_agent_ready_us: ready.agent_ready_us,
            kernel_release: ready.kernel_release.chars().take(64).collect(),
        };
        self.answer_waiting(&Reply {
            ready: Some(info.clone()),
            ..Reply::default()
        });
        self.boot = Boot::Ready(info);
        Ok(())
    }

    fn answer_waiting(&mut self, reply: &Reply) {
        for client in self.clients.iter_mut().filter(|c| c.waits_for_boot) {
            client.waits_for_boot = false;
            // A command that is gone is noticed when its channel is read.
            let _ = control::reply(&client.channel, reply);
        }
    }

    fn accept_client(&mut self) {
        match self.listener.accept() {
            // Dropped: the command sees that the connection is closed.
            Ok(_) if self.clients.len() >= MAX_CLIENTS => log::warn!("too many commands at once"),
            Ok(channel) => self.clients.push(Client {
                channel,
                is_creator: false,
                waits_for_boot: false,
                listens_to: None,
            }),
            Err(e) => log::warn!("accepting a command: {e}"),
        }
    }

    fn serve(&mut self, index: usize) -> Result<(), End> {
        let message = match self.clients[index].channel.recv(Duration::ZERO) {
            Ok(Some(message)) => message,
            closed => {
                if let Err(e) = closed {
                    log::debug!("a command's channel: {e}");
                }
                let client = self.clients.swap_remove(index);
                return if client.is_creator {
                    log::info!("the creating command ended before the container was complete");
                    Err(End::Quietly)
                } else {
                    Ok(())
                };
            }
        };
        let reply = match self.handle(index, &message) {
            Ok(Some(reply)) => reply,
            Ok(None) => return Ok(()),
            Err(e) => Reply {
                error: Some(e.to_string()),
                ..Reply::default()
            },
        };
        if let Err(e) = control::reply(&self.clients[index].channel, &reply) {
            log::debug!("answering a command: {e}");
        }
        Ok(())
    }

    /// `None`: the answer comes later.
    fn handle(&mut self, index: usize, message: &Message) -> io::Result<Option<Reply>> {
        match control::decode(message)? {
            Request::Share { container, name } => {
                let tree = message.fds.first().ok_or_else(|| {
                    io::Error::new(io::ErrorKind::InvalidInput, "no mount tree to share")
                })?;
                self.share.attach(&container, &name, tree.as_fd())?;
                Ok(Some(Reply::default()))
            }
            Request::WaitReady => match &self.boot {
                Boot::Ready(info) => Ok(Some(Reply {
                    ready: Some(info.clone()),
                    ..Reply::default()
                })),
                Boot::Running { .. } => {
                    self.clients[index].waits_for_boot = true;
                    Ok(None)
                }
            },
            Request::Commit => {
                self.clients[index].is_creator = false;
                Ok(Some(Reply::default()))
            }
            Request::Subscribe { container } => self.subscribe(index, container).map(Some),
        }
    }
}

/// What the guest printed last, for the message of a boot that failed: the log
/// itself is removed with everything else.
fn console_tail(dir: &Path) -> String {
    const LINES: usize = 4;
    const LINE_LEN: usize = 200;
    let text = std::fs::read(dir.join(CONSOLE_LOG)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(8192)..]).into_owned();
    let lines: Vec<String> = text
        .lines()
        .map(|line| {
            line.chars()
                .filter(|c| !c.is_control())
                .take(LINE_LEN)
                .collect()
        })
        .filter(|line: &String| !line.trim().is_empty())
        .collect();
    let last = &lines[lines.len().saturating_sub(LINES)..];
    if last.is_empty() {
        return String::new();
    }
    format!("; the guest's console ended with: {}", last.join(" | "))
}

/// Why the loop ends.
enum End {
    Quietly,
    Failed(String),
}

struct ReadyFds {
    vm: bool,
    listener: bool,
    event_listener: bool,
    agent: bool,
    clients: Vec<usize>,
}

/// The agent's event connection, read without blocking and with a bound.
struct AgentEvents {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl AgentEvents {
    /// The events that are complete.
    fn receive(&mut self) -> io::Result<Vec<Event>> {
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(e) => return Err(e),
        }
        let mut events = Vec::new();
        while let Some(len) = self.buffer.first_chunk::<4>() {
            let len = u32::from_le_bytes(*len) as usize;
            if len > MAX_EVENT_LEN {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if self.buffer.len() < 4 + len {
                break;
            }
            let frame: Vec<u8> = self.buffer.drain(..4 + len).collect();
            events.extend(kuasar_runv_protocol::event::read_event(
                &mut frame.as_slice(),
            )?);
        }
        Ok(events)
    }
}

fn vm_config(config: &SandboxerConfig, dir: &Path) -> VmConfig {
    let settings = &config.config;
    let mut params = format!(
        "{}={}",
        cmdline::LOG_LEVEL,
        if settings.debug {
            "debug"
        } else {
            settings.guest.agent_log.as_str()
        }
    );
    if settings.debug_console {
        params.push_str(&format!(" {}=1", cmdline::DEBUG_CONSOLE));
    }
    if !settings.guest.kernel_params.is_empty() {
        params.push(' ');
        params.push_str(&settings.guest.kernel_params);
    }
    VmConfig {
        sandbox_dir: dir.to_owned(),
        kernel: settings.guest.kernel.clone(),
        initrd: settings.guest.image.clone(),
        kernel_params: params,
        size: VmSize {
            vcpus: settings.vm.vcpus,
            memory_mib: settings.vm.memory_mib,
        },
        vsock_socket: VSOCK_VHOST_SOCKET.to_owned(),
        fs: FsDevice {
            socket: FS_VHOST_SOCKET.to_owned(),
            tag: SHARE_TAG.to_owned(),
        },
        console_log: settings.console_log.then(|| CONSOLE_LOG.to_owned()),
        verbose_console: settings.debug,
    }
}
