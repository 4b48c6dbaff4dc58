//! virtio-fs: one directory of the host as a file system of the guest.
//!
//! The file server itself is the `virtiofsd` crate used as a library; this
//! module owns everything around it: the process set-up its main program would
//! do, the virtqueues, and what happens when a request cannot be understood.
//!
//! The directory is live in both directions: the guest asks the host before it
//! trusts a name or an attribute that is older than a moment (see [`config`]),
//! and mounts that appear below the directory while the VM runs are announced as
//! mounts of their own, so that inode numbers stay unique.

mod config;
mod guard;
mod vhost_user;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::server::Server;

use self::guard::Guard;
use self::vhost_user::Backend;
use super::vhost_user::{Error, Handle, serve};

/// Answers FUSE requests.
type FileServer = Server<Guard<PassthroughFs>>;

/// How long the guest may trust names and attributes of files that have not
/// changed for some seconds: for a guest that runs at the machine's speed, and for
/// an emulated one.
///
/// It is also how late a guest may see the first change of such a file. It is not
/// zero because the guest's driver forgets a file, with the pages it has cached of
/// it, when the last user goes and the name is no longer trusted: the time has to
/// cover the life of a short process, or every exec reads its program anew. (Under
/// emulation, 50 runs of a 2 MiB program cost 5.5 s of CPU with 0 ms, 0.5 s with
/// 50 ms, 0.4 s with 1 s.)
pub const TRUST: Duration = Duration::from_millis(10);
/// See [`TRUST`].
pub const TRUST_EMULATED: Duration = Duration::from_millis(50);

/// Serves `shared` to the VMM that connects to `listener`.
///
/// The tag under which the guest finds the file system is an argument of the
/// VMM's device. `trust` is [`TRUST`] or [`TRUST_EMULATED`].
///
/// # Errors
/// No thread or descriptor is to be had. What goes wrong later ends the device,
/// see [`Handle`].
pub fn spawn(listener: UnixListener, shared: OwnedFd, trust: Duration) -> io::Result<Handle> {
    Handle::spawn("fs", move |control| {
        let server = confine(&shared, trust).map_err(Error::Start)?;
        drop(shared);
        let backend = Backend::new(server);
        serve("fs-control", listener, backend, &[], control)
    })
}

/// Confines the calling thread, and those it will start, to the directory.
fn confine(shared: &OwnedFd, trust: Duration) -> io::Result<FileServer> {
    // From here on, working directory, root and umask are this thread's own.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
    let config = config::config()?;
    nix::unistd::fchdir(shared.as_raw_fd())?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")?;
    let files = PassthroughFs::new(config)?;
    Ok(Server::new(Guard::new(files, trust)))
}
