//! The containers of the pod and their processes.
//!
//! A container's id is reserved for as long as anything of it is left: from the
//! start of its creation to the end of its removal. What exists of it is its
//! process, its private directory below [`STATE_DIR`] and its cgroup; the mounts
//! go with the last process of its mount namespace.
//!
//! Its other processes ([`exec`]) are its own while they run; nothing of them is
//! left when they have ended.

mod exec;
mod list;
mod namespaces;
mod preserved;
mod resources;
mod shared_memory;
mod stdio;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kuasar_runv_protocol::agent::{
    NamespaceJoin, Preserved as WantedDescriptor, SharedMemory as WantedMemory,
};
use kuasar_runv_protocol::stream::MAX_ID_LEN;
use kuasar_runv_protocol::{GUEST_SHARE_DIR, GUEST_SHM_DIR};
use tokio::time::{Instant, sleep, timeout};

use crate::cgroup::Cgroup;
use crate::cgroup::oom::OomWatch;
use crate::cgroup::settings::SettingError;
use crate::events::Events;
use crate::helper::{NOTIFY_SOCKET, SECCOMP_FILE, SPEC_FILE};
use crate::process::{Process, SignalError};
use crate::reaper::Reaper;
use crate::streams::{Connection, Streams};
use crate::sys;
use crate::zygote::{
    AnswerSocket, CreateRequest, Created, FailureKind, Request, Zygote, ZygoteError,
};
use namespaces::Namespaces;
use preserved::Preserved;
use shared_memory::{Pool, SharedMemory};
use stdio::{Pipes, Stdio};

/// Where the containers' private directories are; on the agent's tmpfs.
pub const STATE_DIR: &str = "/run/kuasar/containers";

/// How long processes may take to be gone after SIGKILL.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
const KILL_POLL: Duration = Duration::from_millis(2);

#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    #[error("container does not exist")]
    NotFound,
    #[error("container with given ID already exists")]
    Exists,
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Signal(#[from] SignalError),
    #[error("cannot join the {kind} namespace of container {id}: {why}")]
    CannotJoin {
        kind: &'static str,
        id: String,
        why: String,
    },
    #[error("cannot start an already running container")]
    AlreadyStarted,
    #[error("cannot start a container that has stopped")]
    Stopped,
    #[error("cannot exec in a stopped container")]
    ExecStopped,
    #[error("cannot exec in a paused container (use --ignore-paused to override)")]
    ExecPaused,
    #[error("process with given ID already exists")]
    ExecExists,
    #[error("cannot start a container in the paused state")]
    Paused,
    #[error("another operation on the container is in progress")]
    Busy,
    #[error("opening preserved descriptor {number}: {source}")]
    Preserved { number: i32, source: io::Error },
    #[error("the container's processes did not end after SIGKILL")]
    Unkillable,
    #[error("the container's processes could not be frozen within {0:?}")]
    Unfreezable(Duration),
    #[error(transparent)]
    Setting(#[from] SettingError),
    #[error(transparent)]
    Helper(#[from] ZygoteError),
    #[error("{context}: {source}")]
    Io { context: String, source: io::Error },
}

impl ContainerError {
    fn io<E: Into<io::Error>>(context: impl Into<String>) -> impl FnOnce(E) -> ContainerError {
        let context = context.into();
        move |source| ContainerError::Io {
            context,
            source: source.into(),
        }
    }
}

pub use exec::NewProcess;

type Result<T> = std::result::Result<T, ContainerError>;

/// What the host asks a container to be.
#[derive(Debug)]
pub struct NewContainer {
    pub id: String,
    pub spec: Vec<u8>,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    pub plain_newlines: bool,
    pub preserved: Vec<WantedDescriptor>,
    pub joins: Vec<NamespaceJoin>,
    pub shared_memory: Vec<WantedMemory>,
    /// A system call filter, as the host has compiled it; empty without one.
    pub seccomp: Vec<u8>,
}

/// A created container.
struct Container {
    dir: PathBuf,
    cgroup: Cgroup,
    process: Arc<Process>,
    no_new_keyring: bool,
    /// Its other processes by their exec ids; none while one is being started.
    execs: Mutex<HashMap<String, Option<Arc<Process>>>>,
    oom: Arc<OomWatch>,
    namespaces: Namespaces,
    /// Mounted as long as it exists.
    _memory: Vec<Arc<SharedMemory>>,
}

enum Entry {
    /// Being created or removed.
    Reserved,
    Ready(Arc<Container>),
}

/// All containers of the pod.
pub struct Containers {
    entries: Mutex<HashMap<String, Entry>>,
    sequence: AtomicU64,
    state_dir: PathBuf,
    zygote: Zygote,
    reaper: Arc<Reaper>,
    streams: Arc<Streams>,
    events: Events,
    memory: Pool,
}

impl Containers {
    pub fn new(
        state_dir: PathBuf,
        zygote: Zygote,
        reaper: Arc<Reaper>,
        streams: Arc<Streams>,
        events: Events,
    ) -> Containers {
        Containers {
            entries: Mutex::default(),
            sequence: AtomicU64::new(0),
            state_dir,
            zygote,
            reaper,
            streams,
            events,
            memory: Pool::new(Path::new(GUEST_SHM_DIR)),
        }
    }

    /// Creates a container and returns the pid of its waiting process.
    ///
    /// # Errors
    /// See [`ContainerError`]; nothing of the container is left then.
    pub async fn create(self: Arc<Self>, new: NewContainer) -> Result<i32> {
        check_id(&new.id)?;
        self.reserve(&new.id)?;
        let number = self.sequence.fetch_add(1, Ordering::Relaxed);
        let dir = self.state_dir.join(number.to_string());
        let cgroup = Cgroup::of(&new.id);
        match self.build(&new, &dir, &cgroup).await {
            Ok(container) => {
                let pid = container.process.pid;
                self.lock().insert(new.id, Entry::Ready(container));
                Ok(pid)
            }
            Err(e) => {
                self.streams.forget(&new.id);
                if let Err(left) = remove_leftovers(&dir, &cgroup).await {
                    log::error!("cleaning up after {}: {left}", new.id);
                }
                self.lock().remove(&new.id);
                Err(e)
            }
        }
    }

    /// Lets the created process execute its program.
    ///
    /// # Errors
    /// `AlreadyStarted`, `Stopped`, `NotFound`.
    pub async fn start(&self, id: &str) -> Result<()> {
        let container = self.get(id)?;
        let process = &container.process;
        if process.has_ended() {
            return Err(ContainerError::Stopped);
        }
        if container.is_paused()? {
            return Err(ContainerError::Paused);
        }
        if !process.note_start() {
            return Err(ContainerError::AlreadyStarted);
        }
        // libcontainer's side of this waits in accept and reads to the end; what
        // is sent does not matter. Connecting to a listening unix socket and
        // writing a few bytes does not block.
        let notified = std::os::unix::net::UnixStream::connect(container.dir.join(NOTIFY_SOCKET));
        match notified {
            Ok(_) => Ok(()),
            Err(_) if process.has_ended() => Err(ContainerError::Stopped),
            Err(e) => Err(ContainerError::io("starting the container")(e)),
        }
    }

    /// Sends a signal to a container's process, to the one named by a non-empty
    /// `exec_id`, or with `all` to every process in its cgroup.
    ///
    /// # Errors
    /// `NotFound`, `NotRunning`.
    pub fn signal(&self, id: &str, exec_id: &str, signal: i32, all: bool) -> Result<()> {
        let container = self.get(id)?;
        if !exec_id.is_empty() {
            return Ok(container.exec_of(exec_id)?.signal(signal)?);
        }
        if !all {
            return Ok(container.process.signal(signal)?);
        }
        match container.cgroup.signal_all(signal) {
            Err(e) => Err(ContainerError::io("signalling the cgroup")(e)),
            Ok(()) => Ok(()),
        }
    }

    /// The pid of a container's process.
    ///
    /// # Errors
    /// `NotFound`, `NotRunning`.
    pub fn pid(&self, id: &str) -> Result<i32> {
        let container = self.get(id)?;
        if container.process.has_ended() {
            return Err(SignalError::NotRunning.into());
        }
        Ok(container.process.pid)
    }

    /// Removes a container; its processes are killed first. One that is still being
    /// created or removed is waited for.
    ///
    /// # Errors
    /// `NotFound`, `Busy`; when a step failed the container stays, and the call
    /// can be repeated.
    pub async fn delete(&self, id: &str) -> Result<()> {
        let deadline = Instant::now() + KILL_DEADLINE;
        let container = loop {
            let taken = self.take(id);
            let is_busy = matches!(taken, Err(ContainerError::Busy));
            if !is_busy || Instant::now() >= deadline {
                break taken?;
            }
            drop(taken);
            sleep(KILL_POLL).await;
        };
        let result = self.remove(&container).await;
        if result.is_ok() {
            forget_share(id).await;
        }
        let mut entries = self.lock();
        match &result {
            Ok(()) => drop(entries.remove(id)),
            Err(_) => drop(entries.insert(id.to_owned(), Entry::Ready(container))),
        }
        drop(entries);
        if result.is_ok() {
            self.streams.forget(id);
        }
        result
    }

    /// Reserves a container for its removal.
    fn take(&self, id: &str) -> Result<Arc<Container>> {
        let mut entries = self.lock();
        match entries.get(id) {
            None => Err(ContainerError::NotFound),
            Some(Entry::Reserved) => Err(ContainerError::Busy),
            Some(Entry::Ready(container)) => {
                let container = Arc::clone(container);
                entries.insert(id.to_owned(), Entry::Reserved);
                Ok(container)
            }
        }
    }

    async fn remove(&self, container: &Container) -> Result<()> {
        let process = &container.process;
        if !process.has_ended() {
            // It may end by itself at this moment.
            drop(process.signal(libc::SIGKILL));
            timeout(KILL_DEADLINE, process.ended())
                .await
                .map_err(|_| ContainerError::Unkillable)?;
        }
        remove_leftovers(&container.dir, &container.cgroup).await
    }

    async fn build(
        self: &Arc<Self>,
        new: &NewContainer,
        dir: &Path,
        cgroup: &Cgroup,
    ) -> Result<Arc<Container>> {
        fs::create_dir_all(dir).map_err(ContainerError::io("making the container's directory"))?;
        fs::write(dir.join(SPEC_FILE), &new.spec)
            .map_err(ContainerError::io("writing the spec"))?;
        if !new.seccomp.is_empty() {
            fs::write(dir.join(SECCOMP_FILE), &new.seccomp)
                .map_err(ContainerError::io("writing the system call filter"))?;
        }
        let joins = self.find_joins(&new.joins)?;
        let memory = self.memory.take_all(&new.shared_memory)?;
        let announced = [new.stdin, new.stdout, new.stderr];
        let (pipes, theirs) = Pipes::make(announced).map_err(ContainerError::io("making pipes"))?;
        let preserved = Preserved::make(&new.preserved).await?;
        let request = Request::Create(CreateRequest {
            container_id: new.id.clone(),
            dir: dir.to_owned(),
            stdio: announced,
            no_pivot: new.no_pivot,
            no_new_keyring: new.no_new_keyring,
            plain_newlines: new.plain_newlines,
            preserved: preserved.count(),
            joins: joins.set(),
        });
        let with: Vec<_> = theirs
            .iter()
            .chain(joins.descriptors())
            .chain(preserved.theirs())
            .map(AsFd::as_fd)
            .collect();
        let created = self.zygote.submit(&request, &with).await?;
        drop(theirs);
        let namespaces = Namespaces::of(created.pid);
        let (process, hold) = self.adopt(created)?;
        let namespaces =
            namespaces.map_err(ContainerError::io("opening the container's namespaces"))?;
        let oom = OomWatch::new(&new.id, cgroup, &self.events);
        let stdio = Stdio {
            pipes,
            preserved: preserved.into_ours(),
            oom: Some(Arc::clone(&oom)),
            outlives_process: false,
        };
        let (this, id) = (Arc::clone(self), new.id.clone());
        let (of, its) = (Arc::clone(&process), Arc::clone(&oom));
        sys::spawn(async move {
            // The answer goes first: under emulation the host reads it and asks for the
            // start while this is done. What is asked comes after this, because it has to
            // arrive first.
            tokio::task::yield_now().await;
            drop(hold);
            this.attach_streams(&id, "", &of, stdio);
            this.report_end(&id, &of, &its);
        });
        Ok(Arc::new(Container {
            dir: dir.to_owned(),
            cgroup: cgroup.clone(),
            process,
            no_new_keyring: new.no_new_keyring,
            execs: Mutex::default(),
            oom,
            namespaces,
            _memory: memory,
        }))
    }

    /// Knows a process that a helper has made. The agent becomes its parent when the helper
    /// is let go of.
    fn adopt(&self, created: Created) -> Result<(Arc<Process>, AnswerSocket)> {
        let exit = self.reaper.watch(created.pid);
        let terminal = created
            .terminal
            .map(Connection::new)
            .transpose()
            .map_err(ContainerError::io("terminal"))?;
        let process = Process::new(created.pid, exit, terminal)
            .map(Arc::new)
            .map_err(ContainerError::io("opening the process"))?;
        Ok((process, created.hold))
    }

    /// Reports the end of a container's own process when it comes.
    fn report_end(&self, id: &str, process: &Arc<Process>, oom: &Arc<OomWatch>) {
        let (events, of, id) = (self.events.clone(), Arc::clone(process), id.to_owned());
        let oom = Arc::clone(oom);
        sys::spawn(async move {
            let status = of.ended().await;
            oom.before_the_end().await;
            log::debug!("{id}: {status:?}");
            events.exited(&id, "", status, 0);
        });
    }

    fn reserve(&self, id: &str) -> Result<()> {
        let mut entries = self.lock();
        if entries.contains_key(id) {
            return Err(ContainerError::Exists);
        }
        entries.insert(id.to_owned(), Entry::Reserved);
        Ok(())
    }

    fn get(&self, id: &str) -> Result<Arc<Container>> {
        match self.lock().get(id) {
            None => Err(ContainerError::NotFound),
            Some(Entry::Reserved) => Err(ContainerError::Busy),
            Some(Entry::Ready(container)) => Ok(Arc::clone(container)),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// runc's rule for ids, and a length that leaves room for a prefix.
fn check_id(id: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.len() > MAX_ID_LEN || !id.chars().all(allowed) || id == "." || id == ".."
    {
        return Err(ContainerError::Invalid(format!(
            "invalid container ID {id:?}"
        )));
    }
    Ok(())
}

/// Looks for a container's part of the shared directory, which the host has removed
/// by now: that makes the kernel's driver forget the files it knew below, and the
/// host close them.
async fn forget_share(id: &str) {
    let path = Path::new(GUEST_SHARE_DIR).join(id);
    // Not in this thread: the host answers.
    let looked = tokio::task::spawn_blocking(move || fs::symlink_metadata(path)).await;
    drop(looked);
}

/// Kills what is left in the cgroup and removes it and the directory.
async fn remove_leftovers(dir: &Path, cgroup: &Cgroup) -> Result<()> {
    let deadline = Instant::now() + KILL_DEADLINE;
    loop {
        // Each time: an exec may just have put another process there.
        match cgroup.kill() {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(ContainerError::io("killing the cgroup")(e));
            }
            _ => {}
        }
        match cgroup.remove() {
            Ok(()) => break,
            Err(e) if e.raw_os_error() != Some(libc::EBUSY) => {
                return Err(ContainerError::io("removing the cgroup")(e));
            }
            Err(_) if Instant::now() >= deadline => return Err(ContainerError::Unkillable),
            // Killed processes are on their way out.
            Err(_) => sleep(KILL_POLL).await,
        }
    }
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(ContainerError::io("removing the container's directory")(e))
        }
        _ => Ok(()),
    }
}

/// How a failure is to be reported, see service.rs.
impl ContainerError {
    /// Whether the spec, and not the agent, is to blame.
    #[must_use]
    pub fn is_invalid_spec(&self) -> bool {
        matches!(
            self,
            ContainerError::Invalid(_)
                | ContainerError::Signal(SignalError::Invalid(_))
                | ContainerError::Helper(ZygoteError::Failed {
                    kind: FailureKind::InvalidSpec,
                    ..
                })
                | ContainerError::Setting(_)
        )
    }
}
