//! The container's cgroup on the host, where engines look for its processes.
//!
//! A directory in every hierarchy of the host: those of v1, and the one of v2,
//! which on a hybrid host has no controllers. The stand-in lives there, and the VM of a container that stands
//! alone, so that what engines read there is what the container uses.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Access, access};

use super::Error;

/// How long a cgroup may stay busy after its last process has ended.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);
const REMOVE_RETRY: Duration = Duration::from_millis(5);

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
/// container, and with `systemd` of the form `slice:prefix:name`.
///
/// Without a path, an account that is not root gets those it may make, which may be
/// none: engines name a path where cgroups have been delegated to it. runc does the
/// same.
///
/// # Errors
/// A path that leads out of the hierarchy, or no systemd where it is asked for.
pub fn directories(path: Option<&Path>, id: &str, systemd: bool) -> Result<Vec<PathBuf>, Error> {
    let all_or_nothing = path.is_some() || !crate::root::is_rootless();
    let path = match path {
        None => PathBuf::from(id),
        Some(path) if path.as_os_str().is_empty() => PathBuf::from(id),
        Some(path) if systemd => systemd_path(path)?,
        Some(path) => path.to_owned(),
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

/// `slice:prefix:name` as systemd lays it out (systemd.slice(5)).
fn systemd_path(path: &Path) -> Result<PathBuf, Error> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Err(Error::Unsupported(
            "systemd not running on this host, cannot use systemd cgroups manager".into(),
        ));
    }
    let text = path.to_string_lossy();
    let [slice, prefix, name] = text.split(':').collect::<Vec<_>>()[..] else {
        return Err(Error::Unsupported(format!(
            "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got {text:?} instead"
        )));
    };
    Ok(expand_slice(if slice.is_empty() {
        "system.slice"
    } else {
        slice
    })
    .join(format!("{prefix}-{name}.scope")))
}

/// `a-b.slice` lies in `a.slice`.
fn expand_slice(slice: &str) -> PathBuf {
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut path = PathBuf::from("/");
    if stem == "-" {
        return path;
    }
    for (end, _) in stem.match_indices('-').chain([(stem.len(), "")]) {
        path.push(format!("{}.slice", &stem[..end]));
    }
    path
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

/// Removes the directories; those above them stay, as with runc.
///
/// # Errors
/// One that is still busy after a while.
pub fn remove(directories: &[PathBuf]) -> io::Result<()> {
    let end = Instant::now() + REMOVE_DEADLINE;
    for dir in directories {
        loop {
            match fs::remove_dir(dir) {
                Ok(()) => break,
                Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                // A process that has ended leaves its cgroup a little later.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {
                    std::thread::sleep(REMOVE_RETRY);
                }
                Err(e) => {
                    let text = format!("removing the cgroup {}: {e}", dir.display());
                    return Err(io::Error::new(e.kind(), text));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 25 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
34 30 0:29 / /mnt/again rw - cgroup cgroup rw,cpu,cpuacct
";

    #[test]
    fn a_hybrid_host_has_each_hierarchy_once() {
        let found = hierarchies(HYBRID);
        let points: Vec<_> = found.iter().map(|h| h.mount_point.as_path()).collect();
        assert_eq!(
            points,
            [
                Path::new("/sys/fs/cgroup/systemd"),
                Path::new("/sys/fs/cgroup/cpu,cpuacct"),
                Path::new("/sys/fs/cgroup/unified")
            ]
        );
        let own = "4:cpu,cpuacct:/user/a\n1:name=systemd:/init\n0::/v2\n";
        assert_eq!(own_cgroup(own, &found[0]), "/init");
        assert_eq!(own_cgroup(own, &found[1]), "/user/a");
        assert_eq!(own_cgroup(own, &found[2]), "/v2");
    }

    #[test]
    fn a_v2_host_has_one_hierarchy() {
        let found = hierarchies("31 30 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
        assert_eq!(found.len(), 1);
        assert_eq!(own_cgroup("0::/v2\n", &found[0]), "/v2");
    }

    #[test]
    fn slices_nest_by_their_dashes() {
        assert_eq!(
            expand_slice("machine-a-b.slice"),
            Path::new("/machine.slice/machine-a.slice/machine-a-b.slice")
        );
        assert_eq!(expand_slice("-.slice"), Path::new("/"));
    }

    #[test]
    fn a_path_that_leads_upwards_is_refused() {
        assert!(directories(Some(Path::new("/a/../../etc")), "c1", false).is_err());
    }
}
