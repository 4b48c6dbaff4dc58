//! What this machine can do for a hypervisor.
//!
//! That /dev/kvm exists says little: some nested hosts have one that only
//! emulates, thousands of times slower than the processor and with internal
//! errors in the middle of a boot. [`kvm`] really runs guest code on it
//! ([`guest`]), in a child process that is killed at a deadline ([`probe`]), and
//! remembers the answer until the host reboots or its KVM changes ([`cache`]).

mod cache;
mod guest;
mod probe;
mod record;
mod tsc;

use std::fmt;
use std::io;
use std::path::Path;

use cache::{Cache, Machine};
use probe::Outcome;

pub use tsc::frequency_khz as tsc_frequency_khz;

/// Whether KVM is there and works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvmStatus {
    Usable,
    Unusable { reason: String },
    Absent,
}

impl fmt::Display for KvmStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvmStatus::Usable => write!(f, "it works"),
            KvmStatus::Unusable { reason } => write!(f, "{reason}"),
            KvmStatus::Absent => write!(f, "there is no {KVM_DEVICE}"),
        }
    }
}

const KVM_DEVICE: &str = "/dev/kvm";

/// Asks the cache below `cache_dir`, or else the machine. A probe takes some
/// milliseconds where KVM works and up to four seconds where it does not.
///
/// Never fails: what cannot be found out is `Unusable` with the reason, and a
/// cache that cannot be used only costs the time of another probe.
pub fn kvm(cache_dir: &Path) -> KvmStatus {
    let unusable = |reason: String| KvmStatus::Unusable { reason };
    match rustix::fs::access(KVM_DEVICE, READ_WRITE) {
        Ok(()) => {}
        Err(rustix::io::Errno::NOENT) => return KvmStatus::Absent,
        // Cheap to find out and cheap to change: not remembered.
        Err(e) => return unusable(format!("cannot open {KVM_DEVICE}: {}", io::Error::from(e))),
    }
    match Machine::current(Path::new(KVM_DEVICE)) {
        Ok(machine) => ask(&Cache::new(cache_dir), &machine, probe::run),
        Err(e) => unusable(format!("cannot identify this machine: {e}")),
    }
}

const READ_WRITE: rustix::fs::Access =
    rustix::fs::Access::READ_OK.union(rustix::fs::Access::WRITE_OK);

/// The answer for `machine`, from the cache or from `probe`.
fn ask(cache: &Cache, machine: &Machine, probe: impl FnOnce() -> Outcome) -> KvmStatus {
    if let Some(status) = cache.get(machine) {
        return status;
    }
    // Held until the answer is stored: who waited finds it.
    let _lock = match cache.lock() {
        Ok(lock) => Some(lock),
        Err(e) => {
            log::warn!("probing KVM without a lock: {e}");
            None
        }
    };
    if let Some(status) = cache.get(machine) {
        return status;
    }
    let status = match probe() {
        Outcome::Works => KvmStatus::Usable,
        Outcome::Fails(reason) | Outcome::TooSlow(reason) => KvmStatus::Unusable { reason },
        Outcome::Unknown(reason) => return KvmStatus::Unusable { reason },
    };
    if let Err(e) = cache.put(machine, &status) {
        log::warn!("cannot remember whether KVM works: {e}");
    }
    status
}

#[cfg(test)]
mod tests;
