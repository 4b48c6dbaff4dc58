//! The cgroups of the guest: cgroup v2, one per container, below the root.
//!
//! The name has a prefix so that no container id can be the name of a control
//! file. A container with a writable cgroup mount may make cgroups below its
//! own; signals and removal include them.

pub mod devices;
mod freezer;
pub mod oom;
pub mod settings;
mod stats;
mod watch;

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::sys;

/// Where the hierarchy is mounted.
pub const MOUNT_POINT: &str = "/sys/fs/cgroup";
/// Deepest nesting below a container that is followed.
const MAX_DEPTH: usize = 32;

/// The cgroup of one container.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The id has been checked to be a file name.
    #[must_use]
    pub fn of(container_id: &str) -> Cgroup {
        Cgroup {
            path: Path::new(MOUNT_POINT).join(format!("kuasar-{container_id}")),
        }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Absolute path as `/proc/PID/cgroup` has it.
    #[must_use]
    pub fn path_in_hierarchy(&self) -> PathBuf {
        let name = self.path.strip_prefix(MOUNT_POINT).unwrap_or(&self.path);
        Path::new("/").join(name)
    }

    /// # Errors
    /// Of mkdir(2); `EEXIST` as well.
    pub fn create(&self) -> io::Result<()> {
        fs::create_dir(&self.path)
    }

    /// Lets it use no swap.
    ///
    /// # Errors
    /// Of writing the limit; none when the kernel has no swap.
    pub fn forbid_swap(&self) -> io::Result<()> {
        match self.write("memory.swap.max", "0") {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// Sets the weight of its block I/O, from 10 to 1000 as in the runtime specification:
    /// that of the BFQ scheduler as it is, else that of the cost model from 1 to 10000.
    ///
    /// # Errors
    /// Of writing the weight; none when the kernel has neither.
    pub fn set_io_weight(&self, weight: u16) -> io::Result<()> {
        let scaled = 1 + (u32::from(weight).max(10) - 10) * 9999 / 990;
        for (file, weight) in [("io.bfq.weight", weight.into()), ("io.weight", scaled)] {
            match self.write(file, &weight.to_string()) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                result => return result,
            }
        }
        Ok(())
    }

    /// Not fs::write, which would create the file and gets `EACCES` for one that this
    /// kernel does not have.
    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .open(self.path.join(file))?;
        io::Write::write_all(&mut file, value.as_bytes())
    }

    /// Kills every process in it.
    ///
    /// # Errors
    /// `NotFound` when it does not exist.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Sends a signal to every process in it and below it.
    ///
    /// # Errors
    /// `NotFound` when it does not exist.
    pub fn signal_all(&self, signal: i32) -> io::Result<()> {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        walk(&self.path, MAX_DEPTH, &mut |dir| {
            for pid in fs::read_to_string(dir.join("cgroup.procs"))?.lines() {
                let Ok(pid) = pid.parse::<i32>() else {
                    continue;
                };
                // The process may be gone since the file was read; that is what
                // a pidfd is for, and then there is nothing to signal.
                if let Ok(pidfd) = sys::pidfd_open(pid) {
                    drop(sys::pidfd_send_signal(&pidfd, signal));
                }
            }
            Ok(())
        })
    }

    /// Whether it is frozen or about to be.
    ///
    /// # Errors
    /// `NotFound` when it does not exist.
    pub fn is_frozen(&self) -> io::Result<bool> {
        Ok(fs::read_to_string(self.path.join("cgroup.freeze"))?.trim() == "1")
    }

    /// The directory of the cgroup `path` below this one; `None` when that would
    /// not be below. It need not exist.
    #[must_use]
    pub fn below(&self, path: &str) -> Option<PathBuf> {
        let mut below = self.path.clone();
        for component in Path::new(path).components() {
            match component {
                Component::Normal(name) => below.push(name),
                Component::RootDir | Component::CurDir => {}
                Component::ParentDir if below != self.path => drop(below.pop()),
                Component::ParentDir | Component::Prefix(_) => return None,
            }
        }
        Some(below)
    }

    /// Pids of the processes in it and below it, in ascending order.
    ///
    /// # Errors
    /// `NotFound` when it does not exist.
    pub fn pids(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        walk(&self.path, MAX_DEPTH, &mut |dir| {
            let procs = fs::read_to_string(dir.join("cgroup.procs"))?;
            pids.extend(procs.lines().filter_map(|pid| pid.parse::<i32>().ok()));
            Ok(())
        })?;
        pids.sort_unstable();
        Ok(pids)
    }

    /// Whether a live process is in it or below it.
    ///
    /// # Errors
    /// `NotFound` when it does not exist.
    pub fn is_populated(&self) -> io::Result<bool> {
        let events = fs::read_to_string(self.path.join("cgroup.events"))?;
        Ok(events.lines().any(|line| line == "populated 1"))
    }

    /// Removes it and what is below it. Succeeds when it does not exist.
    ///
    /// # Errors
    /// `EBUSY` while a process is in it.
    pub fn remove(&self) -> io::Result<()> {
        let removed = fs::remove_dir(&self.path)
            .or_else(|_| walk(&self.path, MAX_DEPTH, &mut |dir| fs::remove_dir(dir)));
        match removed {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

/// Visits the cgroups below `dir`, then `dir` itself.
fn walk(
    dir: &Path,
    depth: usize,
    visit: &mut impl FnMut(&Path) -> io::Result<()>,
) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if depth > 0 && entry.file_type()?.is_dir() {
            walk(&entry.path(), depth - 1, visit)?;
        }
    }
    visit(dir)
}

/// Lets every cgroup below the root have every controller there is.
///
/// # Errors
/// Of reading or writing the control files.
pub fn enable_controllers() -> io::Result<()> {
    let root = Path::new(MOUNT_POINT);
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    let enable: Vec<String> = controllers
        .split_whitespace()
        .map(|controller| format!("+{controller}"))
        .collect();
    fs::write(root.join("cgroup.subtree_control"), enable.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_id_is_the_name_of_a_control_file() {
        let cgroup = Cgroup::of("memory.max");
        assert_eq!(cgroup.path(), Path::new("/sys/fs/cgroup/kuasar-memory.max"));
        assert_eq!(cgroup.path_in_hierarchy(), Path::new("/kuasar-memory.max"));
    }

    #[test]
    fn a_sub_cgroup_is_never_above() {
        let cgroup = Cgroup::of("c");
        for (path, below) in [
            ("", Some("")),
            ("a/b", Some("a/b")),
            ("/a/./../b", Some("b")),
            ("..", None),
            ("a/../..", None),
        ] {
            let expected = below.map(|below| match below {
                "" => cgroup.path().to_owned(),
                below => cgroup.path().join(below),
            });
            assert_eq!(cgroup.below(path), expected, "{path}");
        }
    }
}
