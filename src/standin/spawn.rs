//! Making a stand-in: the part that runs in the command, and in the child
//! between fork and exec.
//!
//! The child waits until its pid is recorded. That of a container enters
//! namespaces of its own and mounts the container's rootfs and volumes there; when
//! its creator has nothing more to do with it in that state, it makes them its
//! root. That of an exec enters the namespaces of its container's. It gives up every
//! capability, and executes this binary anew, through a read-only mount of it
//! ([`own_binary`](crate::sys::own_binary)), for a small address space. It
//! resolves every path of the container inside the container's root.

use std::collections::VecDeque;
use std::ffi::{CStr, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{ForkResult, chdir, dup2, fchdir, fork, pivot_root, setsid};
use rustix::fs::{Mode, OFlags, mkdirat, openat, readlinkat};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::{CHANNEL_FD, COMMAND, Relayed};
use crate::container::cgroup;
use crate::container::network::Sysctl;
use crate::sys::capabilities;
use crate::sys::mount as mounts;
use crate::sys::seqpacket::{Channel, wait_any_readable};

/// How long each step of the set-up may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long a step may take that waits for hooks without a timeout. The end of
/// the other side, or of the command, ends it earlier.
const UNBOUNDED: Duration = Duration::from_secs(u32::MAX as u64);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("starting the stand-in: {0}")]
    Io(#[from] io::Error),
    /// The child's own words.
    #[error("starting the stand-in: {0}")]
    Setup(String),
    /// What [`Plan::in_rootfs`] said.
    #[error("{0}")]
    InRootfs(String),
    #[error("interrupted")]
    Interrupted,
}

/// Work for a process in the container's namespaces. Gets the pid of the
/// stand-in and a descriptor that hangs up when nobody waits for it any more.
pub type InRootfs<'a> = &'a dyn Fn(i32, BorrowedFd<'_>) -> Result<(), String>;

/// A volume as the stand-in sees it.
pub struct Volume {
    /// Path in the container.
    pub destination: PathBuf,
    /// A cloned mount tree.
    pub tree: OwnedFd,
}

/// What a stand-in needs from the host.
pub struct Plan<'a> {
    /// Shown as its argument, so that `ps` tells what it stands for.
    pub label: &'a str,
    /// A directory that exists; only used as a place to mount on.
    pub mount_point: &'a Path,
    /// A cloned mount tree.
    pub rootfs: OwnedFd,
    pub volumes: Vec<Volume>,
    /// Host cgroup directories that it joins.
    pub cgroups: &'a [PathBuf],
    /// Network, ipc and uts namespaces that it enters instead of making its own.
    pub namespaces: Vec<(CloneFlags, BorrowedFd<'a>)>,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    /// Settings of its network namespace.
    pub sysctls: Vec<Sysctl>,
    /// Slave side of the container's terminal; becomes stdio and the
    /// controlling terminal. Without it stdio is inherited.
    pub terminal: Option<OwnedFd>,
    /// Done in the stand-in when everything is mounted and the host's root is
    /// still there, with the rootfs as working directory.
    pub in_rootfs: Option<InRootfs<'a>>,
}

/// What the stand-in of an exec needs.
pub struct Beside<'a> {
    /// As [`Plan::label`].
    pub label: &'a str,
    /// A pidfd of the container's stand-in.
    pub of: OwnedFd,
    /// Host cgroup directories of the container.
    pub cgroups: &'a [PathBuf],
    /// As [`Plan::terminal`].
    pub terminal: Option<OwnedFd>,
}

/// A child that is a stand-in, or about to become one.
#[derive(Debug)]
pub struct StandIn {
    pub pid: i32,
    channel: Channel,
}

/// Forks a stand-in that waits for [`StandIn::release`]. Must be called before
/// this process has threads. It joins the cgroups itself: the kernel may take its time
/// over that, which others can use.
///
/// # Errors
/// As fork(2).
pub fn spawn(mut plan: Plan<'_>) -> Result<StandIn, Error> {
    let terminal = plan.terminal.take();
    launch(plan.label, terminal, move |channel| {
        join_cgroups(plan.cgroups)?;
        enter_namespaces(&plan).map_err(step("entering namespaces"))?;
        for sysctl in &plan.sysctls {
            sysctl.set().map_err(step("setting up the network"))?;
        }
        mount_rootfs(&plan)?;
        channel.send(b"mounted", &[])?;
        match channel.recv(UNBOUNDED)? {
            Some(message) if message.bytes == b"enter" => {}
            _ => return Err(Error::Setup("its creator is gone".into())),
        }
        if let Some(work) = plan.in_rootfs {
            // A pid fits into an i32 on Linux (PID_MAX_LIMIT is 2^22).
            #[allow(clippy::cast_possible_wrap)]
            work(std::process::id() as i32, channel.as_fd()).map_err(Error::InRootfs)?;
        }
        pivot()
    })
}

/// Forks the stand-in of an exec, as [`spawn`].
///
/// # Errors
/// As fork(2).
pub fn spawn_beside(plan: Beside<'_>) -> Result<StandIn, Error> {
    launch(plan.label, plan.terminal, move |_| {
        join_cgroups(plan.cgroups)?;
        let namespaces = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET;
        setns(&plan.of, namespaces)
            .map_err(|e| step("entering the container's namespaces")(e.into()))
    })
}

fn launch(
    label: &str,
    terminal: Option<OwnedFd>,
    set_up: impl FnOnce(&Channel) -> Result<(), Error>,
) -> Result<StandIn, Error> {
    let (ours, theirs) = Channel::pair()?;
    let exe = crate::sys::own_binary::read_only()?;
    // SAFETY: this process has one thread, so the child may allocate and do
    // everything else that is not async-signal-safe.
    match unsafe { fork() }.map_err(io::Error::from)? {
        ForkResult::Parent { child } => Ok(StandIn {
            pid: child.as_raw(),
            channel: ours,
        }),
        ForkResult::Child => {
            drop(ours);
            let failed = match child(label, terminal, set_up, &theirs, exe.as_fd()) {
                Ok(never) => match never {},
                Err(e) => e,
            };
            let kind = match failed {
                Error::InRootfs(_) => IN_ROOTFS,
                _ => FAILED,
            };
            // The parent is the only one who could tell; without it nobody asks.
            let _ = theirs.send(format!("{kind}{failed}").as_bytes(), &[]);
            // SAFETY: ends the process without running the parent's destructors.
            unsafe { libc::_exit(1) }
        }
    }
}

impl StandIn {
    /// Lets it set itself up: its pid is on record now.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn release(&self) -> Result<(), Error> {
        Ok(self.channel.send(b"go", &[])?)
    }

    /// Waits until it has its namespaces, and the rootfs is mounted in them.
    ///
    /// # Errors
    /// [`Error::Setup`] with the child's reason.
    pub fn wait_mounted(&self) -> Result<(), Error> {
        self.expect(b"mounted", DEADLINE)
    }

    /// Waits for the end of the set-up of an exec's stand-in.
    ///
    /// # Errors
    /// [`Error::Setup`] with the child's reason.
    pub fn wait_ready(&self) -> Result<(), Error> {
        self.expect(b"ready", DEADLINE)
    }

    /// Lets it do what [`Plan::in_rootfs`] says, and leave the host's root, as soon
    /// as everything is mounted.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn enter_rootfs(&self) -> Result<(), Error> {
        Ok(self.channel.send(b"enter", &[])?)
    }

    /// Waits for the end of the set-up, in which [`Plan::in_rootfs`] may take `time`
    /// (`None`: as long as it likes), or until `interrupt` is readable.
    ///
    /// # Errors
    /// [`Error::InRootfs`], [`Error::Interrupted`], [`Error::Setup`].
    pub fn wait_entered(
        &self,
        time: Option<Duration>,
        interrupt: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let deadline = time.map_or(UNBOUNDED, |time| DEADLINE.saturating_add(time));
        let ready = wait_any_readable(&[self.channel.as_fd(), interrupt], deadline)?;
        match ready[..] {
            [false, true] => Err(Error::Interrupted),
            _ => self.expect(b"ready", Duration::ZERO),
        }
    }

    /// Hands over the control connection, the streams that `flags` announces, and what
    /// is relayed besides, of which the last `streams` are the guest's ends.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn attach<'a>(
        &self,
        flags: u8,
        streams: &'a [OwnedFd],
        relayed: impl Iterator<Item = (Relayed, BorrowedFd<'a>)>,
    ) -> Result<(), Error> {
        let relayed: Vec<_> = relayed.collect();
        let (streams, guest) = streams
            .split_at_checked(streams.len().saturating_sub(relayed.len()))
            .unwrap_or((streams, &[]));
        let mut message = vec![flags];
        let mut fds: Vec<BorrowedFd<'_>> = streams.iter().map(AsFd::as_fd).collect();
        for (guest, (kind, host)) in guest.iter().zip(relayed) {
            message.push(kind as u8);
            fds.extend([guest.as_fd(), host]);
        }
        self.channel.send(&message, &fds)?;
        self.expect(b"attached", DEADLINE)
    }

    /// From now on it stays when this process ends.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn commit(&self) -> Result<(), Error> {
        match self.channel.send(b"commit", &[]) {
            // A short process may have ended already, and the stand-in with it.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => Ok(other?),
        }
    }

    fn expect(&self, wanted: &[u8], deadline: Duration) -> Result<(), Error> {
        let message = self
            .channel
            .recv(deadline)?
            .ok_or_else(|| Error::Setup("it ended unexpectedly".into()))?;
        if message.bytes == wanted {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&message.bytes);
        if let Some(said) = text.strip_prefix(IN_ROOTFS) {
            return Err(Error::InRootfs(said.to_owned()));
        }
        Err(Error::Setup(
            text.strip_prefix(FAILED).unwrap_or(&text).to_owned(),
        ))
    }
}

/// What the child's messages about a failure start with.
const FAILED: &str = "error: ";
const IN_ROOTFS: &str = "in rootfs: ";

enum Never {}

/// Says what was being done when an I/O error came.
fn step(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |e| Error::Setup(format!("{what}: {e}"))
}

fn child(
    label: &str,
    terminal: Option<OwnedFd>,
    set_up: impl FnOnce(&Channel) -> Result<(), Error>,
    channel: &Channel,
    exe: BorrowedFd<'_>,
) -> Result<Never, Error> {
    setsid().map_err(io::Error::from)?;
    match channel.recv(DEADLINE)? {
        Some(message) if message.bytes == b"go" => {}
        _ => return Err(Error::Setup("its creator is gone".into())),
    }
    if let Some(terminal) = &terminal {
        use_terminal(terminal.as_fd()).map_err(step("setting up the terminal"))?;
    }
    set_up(channel)?;
    capabilities::limit_to(CapabilitySet::empty()).map_err(step("dropping capabilities"))?;
    channel.send(b"ready", &[])?;
    exec(label, channel.as_fd(), exe).map_err(step("executing the runtime's binary"))
}

fn join_cgroups(cgroups: &[PathBuf]) -> Result<(), Error> {
    let pid = nix::unistd::getpid().as_raw();
    cgroup::join(cgroups, pid).map_err(step("joining the container's cgroups"))
}

fn use_terminal(slave: BorrowedFd<'_>) -> io::Result<()> {
    for target in 0..3 {
        dup2(slave.as_raw_fd(), target)?;
    }
    rustix::process::ioctl_tiocsctty(slave)?;
    // The guest's terminal does the line discipline; this end passes bytes.
    let mut mode = rustix::termios::tcgetattr(slave)?;
    mode.make_raw();
    rustix::termios::tcsetattr(slave, rustix::termios::OptionalActions::Now, &mode)?;
    Ok(())
}

fn enter_namespaces(plan: &Plan<'_>) -> io::Result<()> {
    let mut new = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET;
    for (kind, namespace) in &plan.namespaces {
        setns(namespace, *kind)?;
        new.remove(*kind);
    }
    unshare(new)?;
    // Also in a namespace that is joined (as runc).
    if let Some(name) = &plan.hostname {
        rustix::system::sethostname(name.as_bytes())?;
    }
    if let Some(name) = &plan.domainname {
        rustix::system::setdomainname(name.as_bytes())?;
    }
    Ok(())
}

/// Mounts the rootfs and the volumes in it, and enters it as working directory.
fn mount_rootfs(plan: &Plan<'_>) -> Result<(), Error> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(nix_step("separating mounts"))?;
    let place = crate::sys::unix_socket::open_dir(plan.mount_point)
        .map_err(step("opening the mount point"))?;
    mounts::attach(plan.rootfs.as_fd(), place.as_fd(), Path::new(""))
        .map_err(step("mounting the rootfs"))?;
    for volume in &plan.volumes {
        attach_volume(plan.rootfs.as_fd(), volume).map_err(|e| {
            Error::Setup(format!(
                "mounting a volume on {} in the rootfs: {e}",
                volume.destination.display()
            ))
        })?;
    }
    fchdir(plan.rootfs.as_raw_fd()).map_err(nix_step("entering the rootfs"))
}

/// Makes the working directory the root.
fn pivot() -> Result<(), Error> {
    // pivot_root(2): with "." twice the old root ends up on top of the new one.
    pivot_root(".", ".").map_err(nix_step("pivot_root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(nix_step("leaving the old root"))?;
    chdir("/").map_err(nix_step("entering the new root"))
}

fn nix_step(what: &'static str) -> impl FnOnce(nix::Error) -> Error {
    move |e| Error::Setup(format!("{what}: {e}"))
}

fn attach_volume(root: BorrowedFd<'_>, volume: &Volume) -> io::Result<()> {
    let is_dir = mounts::is_dir(volume.tree.as_fd())?;
    let target = ensure_mount_point(root, &volume.destination, is_dir)?;
    mounts::attach(volume.tree.as_fd(), target.as_fd(), Path::new(""))
}

/// Most symbolic links on the way to a mount point, as in path_resolution(7).
const MAX_LINKS: usize = 40;

/// Opens `path` in the root, making what is missing of it, as runc does. Links
/// are followed inside the root, also to what does not exist yet.
fn ensure_mount_point(root: BorrowedFd<'_>, path: &Path, is_dir: bool) -> io::Result<OwnedFd> {
    let mut ahead: VecDeque<OsString> = components(path);
    let mut resolved = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = ahead.pop_front() {
        if name == ".." {
            resolved.pop();
            continue;
        }
        let parent = mounts::open_in_root(root, &resolved)?;
        match readlinkat(&parent, &name, Vec::new()) {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(io::Error::from_raw_os_error(libc::ELOOP));
                }
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                if target.is_absolute() {
                    resolved = PathBuf::from("/");
                }
                let mut queue = components(&target);
                queue.append(&mut ahead);
                ahead = queue;
                continue;
            }
            // Exists and is no link.
            Err(Errno::INVAL) => {}
            Err(Errno::NOENT) => make(&parent, &name, is_dir || !ahead.is_empty())?,
            Err(e) => return Err(e.into()),
        }
        resolved.push(&name);
    }
    mounts::open_in_root(root, &resolved)
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir))
        .map(|c| c.as_os_str().to_owned())
        .collect()
}

fn make(parent: &OwnedFd, name: &OsStr, is_dir: bool) -> io::Result<()> {
    let made = if is_dir {
        mkdirat(parent, name, Mode::from_raw_mode(0o755))
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(
            parent,
            name,
            flags | OFlags::WRONLY,
            Mode::from_raw_mode(0o644),
        )
        .map(drop)
    };
    match made {
        // The guest may be making the same mount point.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn exec(label: &str, channel: BorrowedFd<'_>, exe: BorrowedFd<'_>) -> io::Result<Never> {
    // The binary's descriptor must survive the descriptors 3 and below.
    let exe = rustix::io::fcntl_dupfd_cloexec(exe, CHANNEL_FD + 1)?;
    if channel.as_raw_fd() == CHANNEL_FD {
        rustix::io::fcntl_setfd(channel, rustix::io::FdFlags::empty())?;
    } else {
        dup2(channel.as_raw_fd(), CHANNEL_FD)?;
    }
    crate::sys::process::close_on_exec_from(CHANNEL_FD + 1)?;
    let label = std::ffi::CString::new(label)?;
    let name = std::ffi::CString::new(COMMAND)?;
    let argv: [&CStr; 3] = [c"kuasar-runv", &name, &label];
    let no_environment: [&CStr; 0] = [];
    nix::unistd::execveat(
        Some(exe.as_raw_fd()),
        c"",
        &argv,
        &no_environment,
        nix::fcntl::AtFlags::AT_EMPTY_PATH,
    )?;
    Err(io::Error::other("execveat returned"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn open_root(path: &Path) -> OwnedFd {
        crate::sys::unix_socket::open_dir(path).unwrap()
    }

    #[test]
    fn mount_points_are_made_inside_the_root_whatever_the_image_links_to() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(&outside).unwrap();
        symlink(&outside, root.join("absolute")).unwrap();
        symlink("../../../../../../..", root.join("up")).unwrap();
        symlink("/not/there/yet", root.join("dangling")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        std::fs::create_dir_all(root.join(outside.strip_prefix("/").unwrap())).unwrap();
        let fd = open_root(&root);
        ensure_mount_point(fd.as_fd(), Path::new("/absolute/data/file"), false).unwrap();
        ensure_mount_point(fd.as_fd(), Path::new("/up/made"), true).unwrap();
        ensure_mount_point(fd.as_fd(), Path::new("/dangling/data"), true).unwrap();
        assert!(root.join("not/there/yet/data").is_dir());
        let looped = ensure_mount_point(fd.as_fd(), Path::new("/loop/x"), true).unwrap_err();
        assert_eq!(looped.raw_os_error(), Some(libc::ELOOP));
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        assert!(root.join("made").is_dir());
        let inside = root.join(outside.strip_prefix("/").unwrap());
        assert!(inside.join("data/file").is_file());
    }
}
