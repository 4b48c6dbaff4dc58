//! Finds what a test left behind, by the name of its world.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::process::{self, Process};

/// Prefix of the name of every world of this test run: cargo is the parent of all
/// test processes of a run. What another run has left, or still uses, is its own.
#[must_use]
pub fn prefix() -> String {
    format!("krt-{}-", std::os::unix::process::parent_id())
}
/// Environment variable that carries the name of the world into every process a
/// call of the runtime starts.
pub const MARKER: &str = "KUASAR_RUNV_TEST_WORLD";

const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Live processes that carry `name` in their command line, environment, cgroup,
/// root, working directory or open files. The caller itself is not one of them.
#[must_use]
pub fn processes(name: &str) -> Vec<Process> {
    let myself = std::fs::canonicalize("/proc/self/exe").ok();
    process::all_pids()
        .into_iter()
        .filter(|pid| mentions(*pid, name))
        // Another test of this process may be between fork and exec.
        .filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).ok() != myself)
        .filter_map(Process::read)
        .filter(Process::is_alive)
        .collect()
}

fn mentions(pid: i32, name: &str) -> bool {
    let proc_dir = PathBuf::from(format!("/proc/{pid}"));
    let in_file =
        |file| fs::read(proc_dir.join(file)).is_ok_and(|bytes| contains(&bytes, name.as_bytes()));
    let in_link = |link: &Path| {
        fs::read_link(link)
            .is_ok_and(|target| contains(target.as_os_str().as_bytes(), name.as_bytes()))
    };
    in_file("cmdline")
        || in_file("environ")
        || in_file("cgroup")
        || in_link(&proc_dir.join("root"))
        || in_link(&proc_dir.join("cwd"))
        || fs::read_dir(proc_dir.join("fd"))
            .is_ok_and(|fds| fds.flatten().any(|fd| in_link(&fd.path())))
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

/// Mounts of this mount namespace that mention `name` in source or target.
#[must_use]
pub fn mounts(name: &str) -> Vec<String> {
    fs::read_to_string("/proc/self/mountinfo")
        .expect("/proc is mounted")
        .lines()
        .filter(|line| line.contains(name))
        .map(|line| format!("mount: {line}"))
        .collect()
}

/// cgroups of any hierarchy, v1 or v2, with `name` in their own name.
#[must_use]
pub fn cgroups(name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    find_directories(Path::new(CGROUP_ROOT), name, 8, &mut found);
    found
}

fn find_directories(dir: &Path, name: &str, depth: u32, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if contains(entry.file_name().as_bytes(), name.as_bytes()) {
            found.push(entry.path());
        }
        if depth > 0 {
            find_directories(&entry.path(), name, depth - 1, found);
        }
    }
}

/// Everything below the state root except the two directories that stay.
#[must_use]
pub fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(root) else {
        return found;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let stays = [OsStr::new("containers"), OsStr::new("sandboxes")]
            .contains(&entry.file_name().as_os_str());
        if stays && path.is_dir() {
            let inner = fs::read_dir(&path).into_iter().flatten().flatten();
            found.extend(inner.map(|e| e.path()));
        } else {
            found.push(path);
        }
    }
    found
}

/// Network interfaces of the host, by name.
#[must_use]
pub fn interfaces() -> BTreeSet<String> {
    fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Everything that still carries the name of a world whose containers have been
/// deleted, one line each. Empty is good.
#[must_use]
pub fn of_world(name: &str, root: &Path) -> Vec<String> {
    let mut found: Vec<String> = processes(name).iter().map(Process::describe).collect();
    found.extend(mounts(name));
    found.extend(
        interfaces()
            .iter()
            .filter(|interface| interface.starts_with("runv"))
            .map(|interface| format!("interface: {interface}")),
    );
    found.extend(
        cgroups(name)
            .iter()
            .map(|c| format!("cgroup: {}", c.display())),
    );
    found.extend(files(root).iter().map(|f| format!("file: {}", f.display())));
    found
}
