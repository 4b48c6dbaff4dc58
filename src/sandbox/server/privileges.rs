//! What the sandboxer may do. It starts with what it takes to make a VM, and keeps
//! what it takes to look after one; its devices' threads keep less
//! (`vm::devices`), and the hypervisor nothing.

use std::io;

use rustix::thread::CapabilitySet;

use crate::config::NetworkModel;
use crate::sys::capabilities::limit_to;
use crate::vm::devices::fs;

/// To attach what is shared later to the shared directory, which is the guest's to
/// set modes in, and to enter network namespaces and set them up, by threads that
/// keep only what that takes (`sandbox::network::watch`). To move itself to another
/// cgroup (`sandbox::host_oom`): with v2, cpusets ask for `SYS_NICE` where a thread has
/// capabilities that the mover has not, as the file server's have.
/// To connect to sockets of the host as who the container's process is
/// (`server::sockets`), `SETUID` and `SETGID`. To listen on the ports that the guest listens on
/// (`sandbox::network::loopback`), `NET_BIND_SERVICE`.
const RUNNING: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SYS_NICE)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_BIND_SERVICE);

/// To make namespaces, confine the file server, and leave nothing to the hypervisor.
const STARTING: CapabilitySet = RUNNING
    .union(fs::CAPABILITIES)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETPCAP);

/// For the process, before anything else.
///
/// # Errors
/// As capset(2).
pub fn start() -> io::Result<()> {
    limit_to(STARTING)
}

/// For the main thread, when VM and devices run.
///
/// # Errors
/// As capset(2).
pub fn keep_running(network: NetworkModel) -> io::Result<()> {
    limit_to(match network {
        // Its devices have no names.
        NetworkModel::Macvtap => RUNNING | CapabilitySet::MKNOD,
        NetworkModel::Tcfilter | NetworkModel::None => RUNNING,
    })
}
