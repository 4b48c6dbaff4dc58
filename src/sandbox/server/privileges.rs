//! What the sandboxer may do. It starts with what it takes to make a VM, and keeps
//! what it takes to look after one; its devices' threads keep less
//! (`vm::devices`), and the hypervisor nothing.

use std::io;

use rustix::thread::CapabilitySet;

use crate::sys::capabilities::limit_to;
use crate::vm::devices::fs;

/// To attach what is shared later to the shared directory, which is the guest's to
/// set modes in.
const RUNNING: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::DAC_OVERRIDE);

/// To make namespaces, confine the file server, and leave nothing to the hypervisor.
const STARTING: CapabilitySet = RUNNING
    .union(fs::CAPABILITIES)
    .union(CapabilitySet::SYS_CHROOT)
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
pub fn keep_running() -> io::Result<()> {
    limit_to(RUNNING)
}
