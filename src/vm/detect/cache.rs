//! The remembered answer about KVM: `kvm.json`.
//!
//! It is valid for one boot of one kernel with one /dev/kvm node (reloading the
//! module makes a new one) and one user. A record of anything else is ignored
//! and replaced.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{KvmStatus, record};

/// Bumped when the record or the probe changes.
const VERSION: u32 = 1;
/// Longest wait for another process's probe, a few times what it takes.
const LOCK_DEADLINE: Duration = Duration::from_secs(6);
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// What an answer depends on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Machine {
    version: u32,
    boot_id: String,
    kernel: String,
    /// Device number, inode and time of the last change of the device node.
    device: (u64, u64, i64, i64),
    uid: u32,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Record {
    machine: Machine,
    usable: bool,
    #[serde(default)]
    reason: String,
}

impl Machine {
    pub(super) fn current(kvm_device: &Path) -> io::Result<Machine> {
        let node = std::fs::metadata(kvm_device)?;
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        Ok(Machine {
            version: VERSION,
            boot_id: record::boot_id()?,
            kernel: kernel.trim().to_owned(),
            device: (node.rdev(), node.ino(), node.ctime(), node.ctime_nsec()),
            uid: rustix::process::geteuid().as_raw(),
        })
    }

    #[cfg(test)]
    pub(super) fn after_reboot(&self) -> Machine {
        Machine {
            boot_id: "another".into(),
            ..self.clone()
        }
    }
}

pub(super) struct Cache {
    dir: PathBuf,
}

impl Cache {
    pub(super) fn new(dir: &Path) -> Cache {
        Cache {
            dir: dir.to_owned(),
        }
    }

    fn record_path(&self) -> PathBuf {
        self.dir.join("kvm.json")
    }

    pub(super) fn get(&self, machine: &Machine) -> Option<KvmStatus> {
        let record: Record = record::read(&self.record_path()).ok()?;
        if record.machine != *machine {
            return None;
        }
        Some(if record.usable {
            KvmStatus::Usable
        } else {
            KvmStatus::Unusable {
                reason: record.reason,
            }
        })
    }

    /// Stores an answer in place of the previous one.
    pub(super) fn put(&self, machine: &Machine, status: &KvmStatus) -> io::Result<()> {
        let (usable, reason) = match status {
            KvmStatus::Usable => (true, String::new()),
            KvmStatus::Unusable { reason } => (false, reason.clone()),
            KvmStatus::Absent => return Ok(()),
        };
        let record = Record {
            machine: machine.clone(),
            usable,
            reason,
        };
        record::write(&self.record_path(), &record)
    }

    /// Keeps other processes from probing until the file is dropped.
    pub(super) fn lock(&self) -> io::Result<File> {
        record::make_dir(&self.dir)?;
        let file = record::private_file(&self.dir.join("kvm.lock"), false)?;
        let start = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < LOCK_DEADLINE => {
                    // flock(2) knows no time-out.
                    std::thread::sleep(LOCK_RETRY);
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}
