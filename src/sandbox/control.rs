//! What commands and the sandboxer say to each other.
//!
//! One JSON message per request and per answer over a `SOCK_SEQPACKET` unix
//! socket; a mount tree travels as a file descriptor. The first message on the
//! channel of the command that boots the VM is the [`SandboxerConfig`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen, socket,
};
use serde::{Deserialize, Serialize};

use kuasar_runv_protocol::socket::Token;

use crate::config::Config;
use crate::root::Root;
use crate::sandbox::network::served::Card;
use crate::sandbox::size::{Demand, Demands};
use crate::sys::process::ProcessRef;
use crate::sys::seqpacket::{Channel, Message, wait_any_readable};
use crate::sys::unix_socket;
use crate::vm::VmSize;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the other end is closed")]
    Closed,
    /// The sandboxer's own words.
    #[error("{0}")]
    Refused(String),
}

/// Everything the sandboxer has to know.
#[derive(Debug, Serialize, Deserialize)]
pub struct SandboxerConfig {
    pub root: PathBuf,
    pub id: String,
    pub config: Config,
    /// What the VM's size follows from.
    pub demands: Demands,
    pub debug: bool,
}

impl SandboxerConfig {
    #[must_use]
    pub fn new(
        root: &Root,
        id: &str,
        config: &Config,
        demands: &Demands,
        debug: bool,
    ) -> SandboxerConfig {
        SandboxerConfig {
            root: root.path().to_owned(),
            id: id.to_owned(),
            config: config.clone(),
            demands: demands.clone(),
            debug,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Attach the mount tree that comes with this message at
    /// `<container>/<name>` of the shared directory.
    Share { container: String, name: String },
    /// Take `<container>/<name>` out of the shared directory again. What the guest has
    /// open stays usable.
    Withdraw { container: String, name: String },
    /// Let the container use the volume `name`; a mount tree of its source comes
    /// with this message.
    ShareVolume {
        container: String,
        name: String,
        writes: bool,
    },
    /// Let the container use the disk `key`. Its file comes with this message, or it
    /// is attached; the answer has no name when neither is so.
    UseDisk {
        container: String,
        key: String,
        mode: DiskMode,
    },
    /// Let the container use the volume `key`, which the guest makes by itself.
    UseVolume { container: String, key: String },
    /// Let the container use the socket of the host that comes with this message
    /// (`O_PATH`), which `key` names.
    UseSocket {
        container: String,
        key: String,
        identities: Identities,
    },
    /// Take away what is shared for the container alone.
    Unshare { container: String },
    /// Take away a volume of the guest that nobody uses; answered when it is gone.
    RemoveVolume { name: String },
    /// Answered when the agent is ready or the boot has failed.
    WaitReady,
    /// Only on the creator's channel: keep the VM when the channel closes. If a pidfd
    /// comes with this message, the VM ends with that process, the stand-in of its first
    /// container, unless somebody else uses it then.
    Commit,
    /// Make the VM large enough for what the container asks for, instead of what it
    /// asked for before. Without a demand it asks for nothing any more.
    Reserve {
        container: String,
        demand: Option<Demand>,
    },
    /// Connect the container to what is in the network namespace that comes with this
    /// message. Answered when the guest has it. Behind it come the connections to the programs
    /// that serve these cards.
    Network { container: String, cards: Vec<Card> },
    /// Undo that: the container is being deleted. Answered when it is done. If one of
    /// the heirs is in the same namespace, it is that one's network from now on.
    NoNetwork { container: String, heirs: Vec<Heir> },
    /// From now on the answers on this channel are notices about the container.
    Subscribe { container: String },
}

/// A container of the pod that may live in another's network namespace.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Heir {
    pub id: String,
    pub standin: ProcessRef,
    /// Device and inode of its network namespace.
    pub namespace: (u64, u64),
}

/// How a disk is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMode {
    /// What the guest mounts; `None` for the device.
    pub file_system: Option<String>,
    pub read_only: bool,
    pub source: DiskSource,
}

/// What is behind a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskSource {
    Image,
    Device,
    /// A program that speaks vhost-user; instead of a file there is a connection to it.
    /// With the file system [`VIRTIO_FS`] it serves that and no disk.
    Program,
}

/// The file system of which the device is a file server and no disk.
pub const VIRTIO_FS: &str = "virtiofs";

/// A disk in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestDisk {
    pub name: String,
    /// Where it is plugged in.
    pub place: String,
}

/// Who a container's processes can be on the host, if not everybody: ranges of ids,
/// first and number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identities {
    pub uids: Option<Vec<(u32, u32)>>,
    pub gids: Option<Vec<(u32, u32)>>,
}

/// What was a container's alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unused {
    /// Of volumes in the shared directory that are no more.
    pub paths: Vec<PathBuf>,
    /// Volumes of the guest, to be removed there and then with
    /// [`Request::RemoveVolume`].
    pub volumes: Vec<String>,
}

/// What happened to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// A process was killed because there was no memory left.
    Oom,
    /// Its own process has ended; the last notice.
    Ended,
}

/// The size of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resized {
    pub booted: VmSize,
    pub now: VmSize,
}

/// When the VM got where: microseconds of `CLOCK_MONOTONIC` on the host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ReadyInfo {
    pub sandboxer_start_us: u64,
    pub vmm_start_us: u64,
    pub agent_ready_us: u64,
    /// The guest's own clock since its kernel started.
    pub guest_agent_start_us: u64,
    pub guest_agent_ready_us: u64,
    pub kernel_release: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<ReadyInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notice: Option<Notice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Resized>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unused: Option<Unused>,
    /// Name of a volume in the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// Where it is plugged in, if it is a disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// What the guest needs to use it, of a socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
}

/// The commands' end.
#[derive(Debug)]
pub struct Connection(Channel);

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Connection {
    #[must_use]
    pub fn new(channel: Channel) -> Connection {
        Connection(channel)
    }

    /// # Errors
    /// As connect(2).
    pub fn connect(dir: BorrowedFd<'_>, name: &str) -> io::Result<Connection> {
        let fd = message_socket()?;
        let address = UnixAddr::new(&unix_socket::short_path(&dir, name))?;
        connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &address)?;
        Ok(Connection(fd.into()))
    }

    /// # Errors
    /// [`Error::Io`].
    pub fn send_config(&self, config: &SandboxerConfig) -> Result<(), Error> {
        let bytes = serde_json::to_vec(config).map_err(io::Error::from)?;
        Ok(self.0.send(&bytes, &[])?)
    }

    /// One request, one answer.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn call(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        deadline: Duration,
    ) -> Result<Reply, Error> {
        self.send(request, fds)?;
        self.receive(deadline)
    }

    /// As [`call`](Self::call); `None` when `interrupt` becomes readable before
    /// the answer is there.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn call_interruptible(
        &self,
        request: &Request,
        deadline: Duration,
        interrupt: BorrowedFd<'_>,
    ) -> Result<Option<Reply>, Error> {
        self.send(request, &[])?;
        let ready = wait_any_readable(&[self.0.as_fd(), interrupt], deadline)?;
        if !ready[0] && ready[1] {
            return Ok(None);
        }
        self.receive(Duration::ZERO).map(Some)
    }

    fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let bytes = serde_json::to_vec(request).map_err(io::Error::from)?;
        Ok(self.0.send(&bytes, fds)?)
    }

    /// An answer that was not asked for just now.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn receive(&self, deadline: Duration) -> Result<Reply, Error> {
        let message = self.0.recv(deadline)?.ok_or(Error::Closed)?;
        let reply: Reply = decode(&message)?;
        match reply.error {
            Some(error) => Err(Error::Refused(error)),
            None => Ok(reply),
        }
    }
}

/// # Errors
/// `InvalidData`.
pub fn decode<T: serde::de::DeserializeOwned>(message: &Message) -> io::Result<T> {
    Ok(serde_json::from_slice(&message.bytes)?)
}

/// # Errors
/// As sendmsg(2).
pub fn reply(channel: &Channel, reply: &Reply) -> io::Result<()> {
    channel.send(&serde_json::to_vec(reply)?, &[])
}

fn message_socket() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

/// The sandboxer's listening end.
pub struct Listener(OwnedFd);

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Listener {
    /// # Errors
    /// As bind(2).
    pub fn bind(dir: BorrowedFd<'_>, name: &str) -> io::Result<Listener> {
        let fd = message_socket()?;
        let address = UnixAddr::new(&unix_socket::short_path(&dir, name))?;
        bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address)?;
        listen(&fd, Backlog::MAXALLOWABLE)?;
        Ok(Listener(fd))
    }

    /// # Errors
    /// As accept4(2).
    pub fn accept(&self) -> io::Result<Channel> {
        use std::os::fd::{AsRawFd, FromRawFd};
        let fd = accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: accept4 has just returned this descriptor; nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(fd.into())
    }
}

/// Microseconds of `CLOCK_MONOTONIC`, which all processes of the host share.
#[must_use]
pub fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (sec, nsec) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    sec * 1_000_000 + nsec / 1000
}
