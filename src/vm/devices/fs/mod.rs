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

pub mod config;
mod vhost_user;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::server::Server;

use self::vhost_user::Backend;
use super::vhost_user::{Error, Handle, serve};

/// Serves `shared` to the VMM that connects to `listener`.
///
/// The tag under which the guest finds the file system is an argument of the
/// VMM's device.
///
/// # Errors
/// No thread or descriptor is to be had. What goes wrong later ends the device,
/// see [`Handle`].
pub fn spawn(listener: UnixListener, shared: OwnedFd) -> io::Result<Handle> {
    Handle::spawn("fs", move |control| {
        let server = confine(&shared).map_err(Error::Start)?;
        drop(shared);
        let backend = Backend::new(server);
        serve("fs-control", listener, backend, &[], control)
    })
}

/// Confines the calling thread, and those it will start, to the directory.
fn confine(shared: &OwnedFd) -> io::Result<Server<PassthroughFs>> {
    // From here on, working directory, root and umask are this thread's own.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
    let config = config::config()?;
    nix::unistd::fchdir(shared.as_raw_fd())?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")?;
    PassthroughFs::new(config).map(Server::new)
}
