//! A cgroup beside the container's for the processes of the VM, while the
//! container's has no room for anybody.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a cgroup that was left may stay busy.
const REMOVE_DEADLINE: Duration = Duration::from_millis(500);
const REMOVE_RETRY: Duration = Duration::from_millis(5);

/// Where the VM's processes go that are in the cgroup `dir`, named after the
/// sandboxer, so that the end of the VM can remove it.
#[must_use]
pub fn aside_of(dir: &Path, sandboxer: i32) -> PathBuf {
    dir.with_file_name(format!("kuasar-runv-aside-{sandboxer}"))
}

fn about(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// The VM's processes that were in the cgroup and have left it.
pub struct Aside {
    from: PathBuf,
    to: PathBuf,
    moved: Vec<i32>,
}

impl Aside {
    /// Moves those of `machine` that are in the cgroup `from` out of it. The first of
    /// them is the sandboxer.
    ///
    /// # Errors
    /// Of the cgroup's files; nothing has been moved then.
    pub fn step(from: &Path, machine: &[i32]) -> io::Result<Aside> {
        let here = fs::read_to_string(from.join("cgroup.procs"))?;
        let here: Vec<i32> = here.lines().filter_map(|pid| pid.parse().ok()).collect();
        let leaving = machine.iter().copied().filter(|pid| here.contains(pid));
        let mut aside = Aside {
            from: from.to_owned(),
            to: aside_of(from, machine.first().copied().unwrap_or_default()),
            moved: Vec::new(),
        };
        for pid in leaving {
            match aside.leave(pid) {
                Ok(()) => aside.moved.push(pid),
                Err(e) => {
                    aside.back()?;
                    return Err(e);
                }
            }
        }
        Ok(aside)
    }

    fn leave(&self, pid: i32) -> io::Result<()> {
        match fs::create_dir(&self.to) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(about("making a cgroup", e)),
            _ => fs::write(self.to.join("cgroup.procs"), pid.to_string())
                .map_err(|e| about("joining it", e)),
        }
    }

    /// Moves them back. A process that has ended meanwhile is not missed.
    ///
    /// # Errors
    /// Of the cgroup's files.
    pub fn back(self) -> io::Result<()> {
        for pid in &self.moved {
            match fs::write(self.from.join("cgroup.procs"), pid.to_string()) {
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                other => other?,
            }
        }
        let end = std::time::Instant::now() + REMOVE_DEADLINE;
        while self.to.exists() {
            match fs::remove_dir(&self.to) {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    if std::time::Instant::now() >= end {
                        return Err(e);
                    }
                    std::thread::sleep(REMOVE_RETRY);
                }
                other => return other,
            }
        }
        Ok(())
    }
}
