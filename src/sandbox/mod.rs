//! The pod's virtual machine, seen from the commands: boot one, find one, end one.
//!
//! A pod's VM belongs to one resident process, the *sandboxer*
//! ([`server`]). Commands talk to it over message sockets ([`control`]): the
//! one that boots it keeps a private channel until the container is created,
//! later ones connect to `control.sock`. The record on disk ([`record`]) names
//! the processes, so that a VM whose sandboxer is gone can still be ended.

pub mod control;
mod guest_volumes;
pub mod host_oom;
pub mod network;
pub mod record;
mod relay;
pub mod server;
mod share;
pub mod size;
pub mod template;
mod volumes;

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kuasar_runv_protocol::loopback::{self, Answer};
use kuasar_runv_protocol::{AGENT_PORT, LOOPBACK_PORT, STREAM_PORT};

use crate::agent_client::streams::{self, Wanted};
use crate::agent_client::{self, Agent, vsock};
use crate::config::Config;
use crate::container::cgroup;
use crate::container::state::RecordError;
use crate::root::{self, Root};
use crate::sys::process::ProcessRef;
use crate::sys::seqpacket::Channel;
use crate::sys::unix_socket;
use crate::vm::VmSize;
use control::{Connection, Heir, Notice, ReadyInfo, Request, Resized, SandboxerConfig};
use network::served::Served;
use record::SandboxRecord;
use size::{Demand, Demands};

/// Socket names in the sandbox directory.
pub const CONTROL_SOCKET: &str = "control.sock";
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// The sandboxer's and the guest kernel's log.
pub const LOG_FILE: &str = "sandboxer.log";
pub const CONSOLE_LOG: &str = "console.log";

/// How long a killed process may take to disappear. A guest's memory is given
/// back on the way.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// How long the sandboxer may take to answer a request that needs no VM.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// What connecting a network takes besides the guest's answer.
const NETWORK_MARGIN: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("sandbox {id}: {source}")]
    Io { id: String, source: io::Error },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("starting the sandboxer: {0}")]
    Spawn(io::Error),
    #[error("the virtual machine did not start: {0}")]
    Boot(String),
    #[error("the sandboxer is gone; its log: {0}")]
    Gone(String),
    #[error("the sandboxer did not answer within {0:?}")]
    Timeout(Duration),
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Agent(#[from] agent_client::Error),
    #[error("the guest refused a connection to its port {port}: {reason}")]
    Connect { port: u32, reason: String },
}

/// A sandbox this command can talk to.
#[derive(Debug)]
pub struct Sandbox {
    id: String,
    dir: PathBuf,
    guest: Guest,
    connection: Connection,
    /// Host cgroups the VM is in.
    cgroups: Vec<PathBuf>,
}

/// The guest of a running pod; to talk to it does not take the sandboxer.
#[derive(Debug)]
pub struct Guest {
    /// The sandbox directory, with the sockets of the guest's ports.
    dir: OwnedFd,
    /// Longest wait for an answer of its agent.
    deadline: Duration,
}

impl Guest {
    /// The guest of the pod `id`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(root: &Root, id: &str) -> Result<Guest, Error> {
        let record = SandboxRecord::read(root, id)?;
        let dir = unix_socket::open_dir(&root.sandbox(id)).map_err(|source| Error::Io {
            id: id.to_owned(),
            source,
        })?;
        Ok(Guest {
            dir,
            deadline: Duration::from_secs(record.agent_timeout_s.into()),
        })
    }

    /// Connects to the agent.
    ///
    /// # Errors
    /// [`Error::Connect`] when it does not listen, [`Error::Agent`].
    pub fn agent(&self) -> Result<Agent, Error> {
        self.finish_agent(self.start_agent()?)
    }

    /// Asks for a connection to the agent.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn start_agent(&self) -> Result<vsock::Dialing, Error> {
        vsock::start(self.dir.as_fd(), VSOCK_SOCKET, AGENT_PORT).map_err(refused(AGENT_PORT))
    }

    /// Waits for the connection to the agent.
    ///
    /// # Errors
    /// As [`agent`](Self::agent).
    pub fn finish_agent(&self, dialing: vsock::Dialing) -> Result<Agent, Error> {
        let stream = dialing.finish(self.deadline).map_err(refused(AGENT_PORT))?;
        Ok(Agent::new(stream, self.deadline)?)
    }

    /// Opens a connection that has to do with the loopback interface of a container;
    /// waits until the guest has said yes.
    ///
    /// # Errors
    /// `ConnectionRefused` when nobody listens there, `TimedOut`, and others when the
    /// guest cannot.
    pub fn loopback(&self, request: &loopback::Request) -> io::Result<UnixStream> {
        let bytes = request.encode().map_err(io::Error::other)?;
        let mut dialing = vsock::start(self.dir.as_fd(), VSOCK_SOCKET, LOOPBACK_PORT)?;
        dialing.say(&bytes)?;
        let mut stream = dialing.finish(self.deadline)?;
        stream.set_read_timeout(Some(self.deadline))?;
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        stream.set_read_timeout(None)?;
        match Answer::of(answer[0]) {
            Answer::Yes => Ok(stream),
            Answer::Refused => Err(io::ErrorKind::ConnectionRefused.into()),
            Answer::Failed => Err(io::Error::other("the guest cannot; its log says why")),
        }
    }

    /// Asks for the streams of a guest process.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn start_streams(
        &self,
        container: &str,
        exec: &str,
        wanted: Wanted,
    ) -> Result<streams::Opening, Error> {
        streams::start(self.dir.as_fd(), VSOCK_SOCKET, container, exec, wanted)
            .map_err(refused(STREAM_PORT))
    }

    /// Waits for the streams, control first.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn finish_streams(&self, opening: streams::Opening) -> Result<Vec<OwnedFd>, Error> {
        opening.finish(self.deadline).map_err(refused(STREAM_PORT))
    }
}

fn refused(port: u32) -> impl Fn(io::Error) -> Error {
    move |e| Error::Connect {
        port,
        reason: e.to_string(),
    }
}

impl Sandbox {
    /// Boots a new VM for the pod `id`. Returns as soon as its sandboxer is
    /// running; [`wait_ready`](Self::wait_ready) waits for the guest. Until
    /// [`commit`](Self::commit) the VM ends with this value (or this process).
    ///
    /// # Errors
    /// See [`Error`]; nothing is left behind.
    pub fn boot(
        root: &Root,
        id: &str,
        config: &Config,
        cgroups: &[PathBuf],
        demands: &Demands,
        debug: bool,
    ) -> Result<Sandbox, Error> {
        let io_error = |source| Error::Io {
            id: id.to_owned(),
            source,
        };
        let dir = root.sandbox(id);
        root::create_private_dir(&dir).map_err(io_error)?;
        let booted = (|| {
            let mut record =
                SandboxRecord::new(id, config.timeouts.agent_s, cgroups).map_err(io_error)?;
            record.most = Some(demands.bounds().most);
            record.write(root)?;
            let dir_fd = unix_socket::open_dir(&dir).map_err(io_error)?;
            let (ours, theirs) = Channel::pair().map_err(Error::Spawn)?;
            let sandboxer = server::spawn(theirs.as_fd(), &dir, cgroups).map_err(Error::Spawn)?;
            drop(theirs);
            // The sandboxer waits for its configuration, and ends if this
            // process dies before it is sent: nothing runs that is not recorded.
            record.sandboxer = Some(ProcessRef::of(sandboxer).map_err(Error::Spawn)?);
            record.write(root)?;
            let sandbox = Sandbox {
                id: id.to_owned(),
                dir: dir.clone(),
                guest: Guest {
                    dir: dir_fd,
                    deadline: config.timeouts.agent(),
                },
                connection: Connection::new(ours),
                cgroups: cgroups.to_owned(),
            };
            sandbox
                .connection
                .send_config(&SandboxerConfig::new(root, id, config, demands, debug))
                .map_err(|e| sandbox.control_error(e))?;
            Ok(sandbox)
        })();
        if booted.is_err() {
            // The error that made it fail is the one to report.
            let _ = end(root, id);
        }
        booted
    }

    /// Connects to the sandboxer of a running pod.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(root: &Root, id: &str) -> Result<Sandbox, Error> {
        let io_error = |source| Error::Io {
            id: id.to_owned(),
            source,
        };
        let guest = Guest::open(root, id)?;
        let cgroups = SandboxRecord::read(root, id)?.cgroups;
        let connection =
            Connection::connect(guest.dir.as_fd(), CONTROL_SOCKET).map_err(io_error)?;
        Ok(Sandbox {
            id: id.to_owned(),
            dir: root.sandbox(id),
            guest,
            connection,
            cgroups,
        })
    }

    /// Connects to the sandboxer of a running pod, if it is still this process: a
    /// sandbox that was deleted and made anew has the same id and another VM.
    ///
    /// # Errors
    /// [`Error::Gone`] when it is not, else see [`Error`].
    pub fn join(root: &Root, id: &str, sandboxer: ProcessRef) -> Result<Sandbox, Error> {
        let sandbox = Self::open(root, id)?;
        // Another one would have been on record before it took connections.
        match SandboxRecord::read(root, id)?.sandboxer {
            Some(current) if current == sandboxer => Ok(sandbox),
            _ => Err(Error::Gone("it was ended and started anew".into())),
        }
    }

    /// Waits until the guest's agent answers; `None` when `interrupt` becomes
    /// readable first.
    ///
    /// # Errors
    /// [`Error::Boot`] with the reason.
    pub fn wait_ready(
        &self,
        deadline: Duration,
        interrupt: BorrowedFd<'_>,
    ) -> Result<Option<ReadyInfo>, Error> {
        let failed = |e| match self.control_error(e) {
            Error::Refused(reason) => Error::Boot(reason),
            Error::Gone(log) => Error::Boot(log),
            other => other,
        };
        let reply = self
            .connection
            .call_interruptible(&Request::WaitReady, deadline, interrupt)
            .map_err(failed)?;
        let Some(reply) = reply else { return Ok(None) };
        match reply.ready {
            Some(info) => Ok(Some(info)),
            None => Err(Error::Boot("the sandboxer's answer has no details".into())),
        }
    }

    /// Attaches a mount tree to the pod's shared directory at
    /// `<container>/<name>`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn share(&self, container: &str, name: &str, tree: BorrowedFd<'_>) -> Result<(), Error> {
        let request = Request::Share {
            container: container.to_owned(),
            name: name.to_owned(),
        };
        self.connection
            .call(&request, &[tree], REQUEST_DEADLINE)
            .map(drop)
            .map_err(|e| self.control_error(e))
    }

    /// Takes `<container>/<name>` out of the shared directory again. What the guest has
    /// open there stays usable.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn withdraw(&self, container: &str, name: &str) -> Result<(), Error> {
        let request = Request::Withdraw {
            container: container.to_owned(),
            name: name.to_owned(),
        };
        self.connection
            .call(&request, &[], REQUEST_DEADLINE)
            .map(drop)
            .map_err(|e| self.control_error(e))
    }

    /// Makes the VM large enough for a container: it has at least the size that all
    /// containers together ask for when this returns.
    ///
    /// # Errors
    /// [`Error::Refused`] when it cannot become so large, and what the agent says
    /// about what was plugged in; the container's earlier demand stands then.
    pub fn reserve(&self, container: &str, demand: Demand) -> Result<VmSize, Error> {
        let request = Request::Reserve {
            container: container.to_owned(),
            demand: Some(demand),
        };
        let reply = self
            .connection
            .call(&request, &[], REQUEST_DEADLINE)
            .map_err(|e| self.control_error(e))?;
        let Some(Resized { booted, now }) = reply.size else {
            return Err(Error::Refused("the sandboxer did not say the size".into()));
        };
        // Also when another command has just made it grow: the guest may not have
        // got there.
        if now != booted {
            cgroup::limits::fit(&self.cgroups, now.memory_mib);
            let added_mib = now.memory_mib.saturating_sub(booted.memory_mib);
            self.agent()?.grow(now.vcpus, added_mib)?;
        }
        Ok(now)
    }

    /// Takes back what a container asked for. The VM keeps its size.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn release(&self, container: &str) -> Result<(), Error> {
        let request = Request::Reserve {
            container: container.to_owned(),
            demand: None,
        };
        self.connection
            .call(&request, &[], REQUEST_DEADLINE)
            .map(drop)
            .map_err(|e| self.control_error(e))
    }

    /// Connects the container to the network in `namespace` and to the cards that are served
    /// by programs, and keeps it connected to what will be there. Returns when its network is complete in the guest.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::Refused`] with what cannot be connected.
    pub fn connect_network(
        &self,
        container: &str,
        namespace: BorrowedFd<'_>,
        served: &[Served],
    ) -> Result<(), Error> {
        let request = Request::Network {
            container: container.to_owned(),
            cards: served.iter().map(|served| served.card.clone()).collect(),
        };
        let sockets = served.iter().map(|served| served.socket.as_fd());
        let fds: Vec<_> = [namespace].into_iter().chain(sockets).collect();
        let deadline = self.guest.deadline + NETWORK_MARGIN;
        self.connection
            .call(&request, &fds, deadline)
            .map(drop)
            .map_err(|e| match e {
                control::Error::Io(e) if e.kind() == io::ErrorKind::TimedOut => {
                    Error::Timeout(deadline)
                }
                other => self.control_error(other),
            })
    }

    /// Disconnects a container that is being deleted from its network, while the VM
    /// goes on; or leaves the network to one of `heirs` that is in the same namespace.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn disconnect_network(&self, container: &str, heirs: Vec<Heir>) -> Result<(), Error> {
        let request = Request::NoNetwork {
            container: container.to_owned(),
            heirs,
        };
        self.connection
            .call(&request, &[], REQUEST_DEADLINE)
            .map(drop)
            .map_err(|e| self.control_error(e))
    }

    /// From now on the VM stays when this command ends: until it is ended, or until the
    /// process `last` (a pidfd) has ended, if nobody else uses the VM then.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn commit(&self, last: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        self.connection
            .call(&Request::Commit, last.as_slice(), REQUEST_DEADLINE)
            .map(drop)
            .map_err(|e| self.control_error(e))
    }

    /// Listens for what happens to a container: from now on this value becomes
    /// readable when there is a [`notice`](Self::notice), and takes no requests.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn subscribe(&self, container: &str) -> Result<(), Error> {
        let request = Request::Subscribe {
            container: container.to_owned(),
        };
        self.connection
            .call(&request, &[], REQUEST_DEADLINE)
            .map(drop)
            .map_err(|e| self.control_error(e))
    }

    /// The notice that has arrived; `None` when the sandboxer has ended.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::Timeout`] when there is none.
    pub fn notice(&self) -> Result<Option<Notice>, Error> {
        match self.connection.receive(Duration::ZERO) {
            Ok(reply) => Ok(reply.notice),
            Err(error) => match self.control_error(error) {
                Error::Gone(_) => Ok(None),
                other => Err(other),
            },
        }
    }

    /// Connects to the guest's agent.
    ///
    /// # Errors
    /// [`Error::Connect`] when it does not listen, [`Error::Agent`].
    pub fn agent(&self) -> Result<Agent, Error> {
        self.guest.agent()
    }

    /// Waits no longer than this for answers of the guest.
    pub fn limit_patience(&mut self, deadline: Duration) {
        self.guest.deadline = self.guest.deadline.min(deadline);
    }

    /// The pod's guest.
    #[must_use]
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    fn control_error(&self, error: control::Error) -> Error {
        match error {
            control::Error::Refused(reason) => Error::Refused(reason),
            control::Error::Closed => Error::Gone(self.log_tail()),
            control::Error::Io(e) if e.kind() == io::ErrorKind::TimedOut => {
                Error::Timeout(REQUEST_DEADLINE)
            }
            control::Error::Io(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Error::Gone(self.log_tail())
            }
            control::Error::Io(source) => Error::Io {
                id: self.id.clone(),
                source,
            },
        }
    }

    /// The last line the sandboxer logged, which says why it ended.
    fn log_tail(&self) -> String {
        let path = self.dir.join(LOG_FILE);
        let text = std::fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        match text.lines().rev().find(|line| !line.trim().is_empty()) {
            Some(line) => line.to_owned(),
            None => format!("{} is empty", path.display()),
        }
    }
}

impl AsFd for Sandbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

/// Ends the VM of a pod and removes what is left of it: asks the sandboxer, and
/// kills what does not end by itself. Works on whatever a crash left, and on
/// nothing at all.
///
/// # Errors
/// When a process cannot be ended or a file cannot be removed.
pub fn end(root: &Root, id: &str) -> Result<(), Error> {
    let io_error = |source| Error::Io {
        id: id.to_owned(),
        source,
    };
    match SandboxRecord::read(root, id) {
        Ok(record) => {
            end_processes(&record).map_err(io_error)?;
            cgroup::remove(&aside(&record)).map_err(io_error)?;
            cgroup::remove(&record.cgroups).map_err(io_error)?;
        }
        // Without a readable record there is nothing to end but files: the
        // sandboxer gets its configuration only after it has been recorded.
        Err(RecordError::NotFound | RecordError::Invalid { .. }) => {}
        Err(e) => return Err(e.into()),
    }
    network::give_hardware_back(&root.sandbox(id)).map_err(io_error)?;
    root::remove_private_dir(&root.sandbox(id)).map_err(io_error)
}

/// Where its processes may have been when they ended.
fn aside(record: &SandboxRecord) -> Vec<PathBuf> {
    let Some(sandboxer) = record.sandboxer else {
        return Vec::new();
    };
    let beside = |dir: &PathBuf| host_oom::aside_of(dir, sandboxer.pid);
    record.cgroups.iter().map(beside).collect()
}

fn end_processes(record: &SandboxRecord) -> io::Result<()> {
    if crate::sys::process::boot_id()? != record.boot_id {
        return Ok(());
    }
    let started = Instant::now();
    // SIGKILL of the sandboxer takes the hypervisor along (PDEATHSIG), and the
    // mount namespace with the shares, and the taps: there is nothing that an
    // orderly end would add. The guest has no state of its own.
    for process in [record.sandboxer, record.vm].into_iter().flatten() {
        process.signal(rustix::process::Signal::KILL)?;
    }
    for process in [record.sandboxer, record.vm].into_iter().flatten() {
        if !process.wait(KILL_DEADLINE.saturating_sub(started.elapsed()))? {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("process {} does not end after SIGKILL", process.pid),
            ));
        }
    }
    Ok(())
}
