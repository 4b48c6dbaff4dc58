//! virtio-fs: one directory of the host as a file system of the guest.
//!
//! The file server itself is the `virtiofsd` crate used as a library; this
//! module owns everything around it: the set-up that its main program would do
//! for a process of its own, the virtqueues, what the guest may cache, and what
//! happens when a request cannot be understood.
//!
//! The directory is live in both directions: the guest asks the host about names
//! and attributes whenever it uses them (see [`guard`]), and mounts that appear
//! below the directory while the VM runs are announced as mounts of their own, so
//! that inode numbers stay unique.
//!
//! Three things keep a hostile guest inside the directory. It has no way to name a
//! file but by the number of one it has been given and a name in it, and names with
//! `/` or `..` are refused ([`guard`]). Symbolic links are handed to the guest as
//! text and never followed on the host (`O_NOFOLLOW`, and openat2(2) with
//! `RESOLVE_IN_ROOT` where the server opens by name). And the serving threads have
//! the directory as their root, so that even a path that slipped through would end
//! there. These threads keep root, working directory and umask to themselves
//! (`CLONE_FS`), and take on the user and groups of the guest's process per thread
//! and per request: nothing changes for the rest of the process. Of the process's
//! capabilities they keep those of a file server ([`CAPABILITIES`]).
//!
//! The threads see the mount namespace of the thread that called [`spawn`]. A mount
//! in the directory is kept busy by the files in it that the guest knows, so it is
//! taken away with `MNT_DETACH`; it is really gone when the guest has looked at the
//! mount point again, which makes its driver drop the whole mount.
//!
//! Not passed on to the host: file locks (they hold within the guest) and
//! `O_TMPFILE`. Changes by the host raise no inotify events in the guest.
//!
//! - [`device`]: requests in, answers out
//! - [`guard`]: checks requests and decides what the guest may trust
//! - [`known`]: the files that the guest knows, and who has changed them
//! - [`privileges`]: what the thread does without when it acts for a user
//! - [`config`]: the server's own options
//! - [`vhost_user`]: the glue towards an external VMM

mod config;
mod device;
#[cfg(any(test, fuzzing))]
#[allow(clippy::expect_used, reason = "a fuzz target fails by panicking")]
pub(in crate::vm) mod fuzzing;
mod guard;
mod known;
mod privileges;
#[cfg(test)]
mod tests;
mod vhost_user;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use rustix::thread::CapabilitySet;
use virtiofsd::passthrough::PassthroughFs;

use self::device::Device;
use self::guard::Guard;
use self::vhost_user::Backend;
use super::vhost_user::{Control, Error, Handle, serve};
use crate::sys::capabilities::limit_to;

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
        let backend = start(shared, control)?;
        serve("fs-control", listener, backend, &[], control)
    })
}

/// Serves `shared` to the built-in VMM: `work` owns the virtqueues, and runs on the
/// device's thread.
///
/// # Errors
/// As [`spawn`].
pub(in crate::vm) fn spawn_with<F>(shared: OwnedFd, work: F) -> io::Result<Handle>
where
    F: FnOnce(Arc<Backend>, &Control) -> io::Result<()> + Send + 'static,
{
    Handle::spawn("fs", move |control| {
        work(start(shared, control)?, control).map_err(Error::Start)
    })
}

fn start(shared: OwnedFd, control: &Control) -> Result<Arc<Backend>, Error> {
    let device = confine(&shared).map_err(Error::Start)?;
    Backend::new(device, control.status()).map_err(Error::Start)
}

/// Kind of the guest memory that the file server works with.
pub(in crate::vm) type Bitmap = vhost_user_backend::bitmap::BitmapMmapRegion;

/// What a file server needs to act for any user of the guest, as `virtiofsd` keeps
/// by default. Nothing that could mount, trace, or leave the directory.
pub const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Confines the calling thread, and those it will start, to the directory.
fn confine(shared: &OwnedFd) -> io::Result<Device> {
    // From here on, working directory, root and umask are this thread's own.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
    let config = config::config()?;
    let descriptors = config.guest_fd_limit;
    nix::unistd::fchdir(shared.as_raw_fd())?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")?;
    let files = PassthroughFs::new(config)?;
    limit_to(CAPABILITIES)?;
    Ok(Device::new(Guard::new(files, descriptors)))
}
