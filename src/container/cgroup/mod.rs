//! The container's cgroup on the host, where engines look for its processes.
//!
//! A directory in every hierarchy of the host: those of v1, and the one of v2,
//! which on a hybrid host has no controllers. The stand-in lives there, and the VM of a container that stands
//! alone, so that what engines read there is what the container uses.

pub mod limits;
pub mod systemd;

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Access, access};

use self::systemd::Scope;
use super::Error;

/// How long a cgroup may stay busy after its last process has ended: a machine of KVM is
/// taken apart meanwhile, with threads of the kernel's that are in its cgroup.
const REMOVE_DEADLINE: Duration = Duration::from_secs(10);
/// Wait before the first of the next attempts, and before the last ones.
const REMOVE_RETRY: std::ops::Range<Duration> =
    Duration::from_millis(2)..Duration::from_millis(100);
/// Most processes that the error names.
const MAX_NAMED: usize = 5;

/// One cgroup hierarchy of the host.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    mount_point: PathBuf,
    /// Controllers of a v1 hierarchy (`cpu,cpuacct` or `name=systemd`), empty for v2.
    controllers: Vec<String>,
}

/// The directories of a container: one per hierarchy.
///
/// `path` is `linux.cgroupsPath`: absolute from the root of each hierarchy,
/// relative from this process's own cgroup, empty for a cgroup named after the
/// container. A scope of systemd has its own place.
///
/// Without a path, an account that is not root gets those it may make, which may be
/// none: engines name a path where cgroups have been delegated to it. runc does the
/// same.
///
/// # Errors
/// A path that leads out of the hierarchy.
pub fn directories(
    path: Option<&Path>,
    id: &str,
    scope: Option<&Scope>,
) -> Result<Vec<PathBuf>, Error> {
    let all_or_nothing = path.is_some() || !crate::root::is_rootless();
    let path = match (scope, path) {
        (Some(scope), _) => scope.path(),
        (None, Some(path)) if !path.as_os_str().is_empty() => path.to_owned(),
        (None, _) => PathBuf::from(id),
    };
    if path.components().any(|c| c == Component::ParentDir) {
        return Err(Error::Unsupported(format!(
            "config.json: linux.cgroupsPath {} leads upwards",
            path.display()
        )));
    }
    let read = |file: &str| {
        fs::read_to_string(file).map_err(|source| Error::Cgroup {
            path: file.into(),
            source,
        })
    };
    let own = read("/proc/self/cgroup")?;
    Ok(hierarchies(&read("/proc/self/mountinfo")?)
        .iter()
        .map(|hierarchy| match path.strip_prefix("/") {
            Ok(absolute) => hierarchy.mount_point.join(absolute),
            Err(_) => hierarchy
                .mount_point
                .join(own_cgroup(&own, hierarchy).trim_start_matches('/'))
                .join(&path),
        })
        .filter(|directory| all_or_nothing || may_be_made(directory))
        .collect())
}

/// Whether this process may make a directory whose parent exists.
fn may_be_made(directory: &Path) -> bool {
    directory
        .parent()
        .is_some_and(|parent| access(parent, Access::WRITE_OK).is_ok())
}

/// Whether the host has cgroup v2 and nothing else.
fn is_v2_only() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut v1 = Vec::new();
    let mut v2 = Vec::new();
    for line in mountinfo.lines() {
        // proc(5): ... mount point at field 5, then after " - " type, source, options.
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let Some(mount_point) = left.split(' ').nth(4) else {
            continue;
        };
        let mut right = right.split(' ');
        let kind = right.next().unwrap_or("");
        let options = right.nth(1).unwrap_or("");
        let mount_point = PathBuf::from(mount_point);
        match kind {
            "cgroup" => {
                let controllers = options
                    .split(',')
                    .filter(|o| {
                        !matches!(*o, "rw" | "ro" | "xattr" | "noprefix" | "clone_children")
                    })
                    .map(str::to_owned)
                    .collect();
                v1.push(Hierarchy {
                    mount_point,
                    controllers,
                });
            }
            "cgroup2" => v2.push(Hierarchy {
                mount_point,
                controllers: Vec::new(),
            }),
            _ => {}
        }
    }
    // The same hierarchy may be mounted twice; the first is the usual place.
    let mut seen: Vec<Vec<String>> = Vec::new();
    v1.retain(|h| {
        let new = !seen.contains(&h.controllers);
        seen.push(h.controllers.clone());
        new
    });
    v2.truncate(1);
    v1.append(&mut v2);
    v1
}

/// This process's cgroup in a hierarchy, from `/proc/self/cgroup`.
fn own_cgroup<'a>(own: &'a str, hierarchy: &Hierarchy) -> &'a str {
    own.lines()
        .find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let is_it = if hierarchy.controllers.is_empty() {
                number == "0" && controllers.is_empty()
            } else {
                controllers
                    .split(',')
                    .any(|c| hierarchy.controllers.iter().any(|h| h == c))
            };
            is_it.then_some(path)
        })
        .unwrap_or("/")
}

/// Makes the directories.
///
/// # Errors
/// As mkdir(2); those made before are left for [`remove`].
pub fn create(directories: &[PathBuf]) -> Result<(), Error> {
    for dir in directories {
        make(dir).map_err(|source| Error::Cgroup {
            path: dir.clone(),
            source,
        })?;
    }
    Ok(())
}

/// Makes one directory and what is missing above it. A cpuset of v1 starts
/// empty and takes no process until it has CPUs and memory nodes.
fn make(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        make(parent)?;
        pass_controllers_on(parent);
    }
    match fs::create_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (own, parent) = (dir.join(file), dir.with_file_name(file));
        // In v2 an empty value means the parent's.
        let is_v1 = !dir.join("cgroup.controllers").exists() && own.exists();
        if is_v1 && fs::read_to_string(&own)?.trim().is_empty() {
            fs::write(&own, fs::read_to_string(parent)?)?;
        }
    }
    Ok(())
}

/// Lets the cgroups below a directory of v2 have its controllers, without which they
/// have neither limits nor statistics. One that holds processes may not, nor one
/// that belongs to somebody else.
fn pass_controllers_on(dir: &Path) {
    let Ok(controllers) = fs::read_to_string(dir.join("cgroup.controllers")) else {
        return;
    };
    for controller in controllers.split_whitespace() {
        let switch = dir.join("cgroup.subtree_control");
        if let Err(e) = fs::write(&switch, format!("+{controller}")) {
            log::debug!("{controller} in {}: {e}", switch.display());
        }
    }
}

/// Moves a process (with all its threads) into the cgroups.
///
/// # Errors
/// As write(2) to `cgroup.procs`.
pub fn join(directories: &[PathBuf], pid: i32) -> io::Result<()> {
    for dir in directories {
        fs::write(dir.join("cgroup.procs"), pid.to_string())
            .map_err(|e| io::Error::new(e.kind(), format!("joining {}: {e}", dir.display())))?;
    }
    Ok(())
}

/// Removes the directories, with those that somebody has made below them; those above
/// them stay, as with runc.
///
/// # Errors
/// One that is still busy after a while.
pub fn remove(directories: &[PathBuf]) -> io::Result<()> {
    let end = Instant::now() + REMOVE_DEADLINE;
    for dir in directories {
        remove_one(dir, end).map_err(|e| {
            let text = format!(
                "removing the cgroup {}: {e}{}",
                dir.display(),
                who_is_in(dir)
            );
            io::Error::new(e.kind(), text)
        })?;
    }
    Ok(())
}

fn remove_one(dir: &Path, end: Instant) -> io::Result<()> {
    let mut wait = REMOVE_RETRY.start;
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            // There are others in it, or a process that has ended leaves it a little later.
            Err(e) if is_busy(&e) && Instant::now() < end => {
                for below in subdirectories(dir) {
                    remove_one(&below, end)?;
                }
                std::thread::sleep(wait);
                wait = (wait * 2).min(REMOVE_RETRY.end);
            }
            Err(e) => return Err(e),
        }
    }
}

fn is_busy(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EBUSY | libc::ENOTEMPTY))
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.filter(is_dir).map(|entry| entry.path()).collect()
}

/// The processes that keep a cgroup busy, as the end of an error's text.
fn who_is_in(dir: &Path) -> String {
    let pids = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let names: Vec<String> = pids
        .lines()
        .take(MAX_NAMED)
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("{pid} ({})", name.trim_end())
        })
        .collect();
    match names.as_slice() {
        [] => String::new(),
        names => format!("; in it are {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests;
