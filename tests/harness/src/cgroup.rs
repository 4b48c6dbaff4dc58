//! A process's cgroups on the host, as engines look at them.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The file of the process's cgroup that has this controller, called `names[0]` with
/// v1 and `names[1]` with v2, if there is one.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn file(pid: i32, controller: &str, names: [&str; 2]) -> Option<PathBuf> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroups of a process");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    cgroups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let is_v2 = controllers.is_empty();
        if !is_v2 && !controllers.split(',').any(|c| c == controller) {
            return None;
        }
        let mount = mounts.lines().find_map(|mount| {
            let (left, right) = mount.split_once(" - ")?;
            let options = right.split(' ').nth(2)?;
            let is_it = match is_v2 {
                true => right.starts_with("cgroup2 "),
                false => {
                    right.starts_with("cgroup ") && options.split(',').any(|o| o == controller)
                }
            };
            is_it.then(|| left.split(' ').nth(4))?
        })?;
        let file = Path::new(mount)
            .join(path.trim_start_matches('/'))
            .join(names[usize::from(is_v2)]);
        file.exists().then_some(file)
    })
}

/// Listens for kills for lack of memory in a cgroup as conmon and containerd's shim do,
/// which find it by the pid.
pub struct OomListener {
    counts: File,
    /// With v1, where the kernel adds one for each time.
    notified: Option<File>,
}

impl OomListener {
    /// # Panics
    /// When the process is in no cgroup that has its memory.
    #[must_use]
    pub fn new(pid: i32) -> OomListener {
        let path = file(pid, "memory", ["memory.oom_control", "memory.events"]);
        let path = path.expect("a cgroup with the memory of the process");
        let counts = File::open(&path).expect("file with counts");
        let notified = path.ends_with("memory.oom_control").then(|| {
            // SAFETY: a new descriptor.
            let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
            assert!(fd >= 0, "eventfd");
            let control = path.with_file_name("cgroup.event_control");
            fs::write(control, format!("{fd} {}", counts.as_raw_fd())).expect("registration");
            // SAFETY: nobody else has it.
            File::from(unsafe { OwnedFd::from_raw_fd(fd) })
        });
        OomListener { counts, notified }
    }

    /// Kills that the kernel has counted.
    ///
    /// # Panics
    /// When the cgroup is gone.
    #[must_use]
    pub fn kills(&self) -> u64 {
        let mut content = [0; 4096];
        let len = self.counts.read_at(&mut content, 0).expect("counts");
        let content = String::from_utf8_lossy(&content[..len]).into_owned();
        let mut lines = content.lines();
        let kills = lines.find_map(|line| line.strip_prefix("oom_kill "));
        kills
            .and_then(|count| count.parse().ok())
            .expect("oom_kill")
    }

    /// Whether the kernel has sent a notification since the last call; with v2 there
    /// is no more to it than the counts.
    #[must_use]
    pub fn was_notified(&self) -> bool {
        let Some(notified) = &self.notified else {
            return self.kills() > 0;
        };
        std::io::Read::read(&mut &*notified, &mut [0; 8]).is_ok()
    }
}
