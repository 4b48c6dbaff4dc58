//! The part that runs inside the guests.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Environment variable that makes this binary the workload: where the directories
/// below are.
pub const VARIABLE: &str = "KUASAR_RUNV_BENCH_FILES";
/// Files are looked at and made in areas below this directory, and nothing else
/// happens in it.
pub const WORK: &str = "work";
/// Where the host says what it wants next, in a file [`ORDER`], and the guest what it
/// took, in a file of the area's name.
pub const ORDERS: &str = "orders";
pub const ORDER: &str = "order";
/// Tag and mount point of the share, when this binary is an init.
const TAG: &str = "kuasar-share";
const MOUNT_POINT: &str = "/run";
/// Where an init puts itself, as a container is: its memory is accounted for.
const CGROUPS: &str = "/cgroups";

/// The file that is read or written, and its size.
pub const DATA: &str = "data";
pub const BYTES: usize = 64 << 20;
/// That are looked at or made.
pub const FILES: usize = 1000;
/// As much as cat and cp move at once.
const BLOCK: usize = 128 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    Read,
    Write,
    Stat,
    Create,
}

impl Task {
    pub const ALL: [Task; 4] = [Task::Read, Task::Write, Task::Stat, Task::Create];

    pub fn name(self) -> &'static str {
        match self {
            Task::Read => "read",
            Task::Write => "write",
            Task::Stat => "stat",
            Task::Create => "create",
        }
    }
}

/// Where the directories are, if this process is the workload. As the init of a
/// machine it has no environment of ours, and first makes itself the conditions that
/// a container has.
pub fn root() -> Option<PathBuf> {
    if let Some(root) = std::env::var_os(VARIABLE) {
        return Some(root.into());
    }
    let is_init = std::process::id() == 1 && !Path::new("/proc/self").exists();
    is_init.then(|| {
        join_cgroup();
        mount(TAG, MOUNT_POINT, "virtiofs");
        MOUNT_POINT.into()
    })
}

fn mount(source: &str, target: &str, kind: &str) {
    let c = |text: &str| std::ffi::CString::new(text).expect("no NUL");
    let (source, place, c_kind) = (c(source), c(target), c(kind));
    // SAFETY: C strings that outlive the call; the file systems take no data.
    let rc = unsafe {
        libc::mount(
            source.as_ptr(),
            place.as_ptr(),
            c_kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    assert_eq!(rc, 0, "{kind}: {}", std::io::Error::last_os_error());
}

/// A cgroup with all controllers there are.
fn join_cgroup() {
    let root = Path::new(CGROUPS);
    fs::create_dir(root).expect("the initramfs is writable");
    mount("cgroup2", CGROUPS, "cgroup2");
    let there = fs::read_to_string(root.join("cgroup.controllers")).expect("controllers");
    let enable: Vec<_> = there.split_whitespace().map(|c| format!("+{c}")).collect();
    fs::write(root.join("cgroup.subtree_control"), enable.join(" ")).expect("controllers");
    let own = root.join("workload");
    fs::create_dir(&own).expect("a cgroup");
    fs::write(own.join("cgroup.procs"), "0").expect("a process may move itself");
}

/// Does what it is told, for ever.
pub fn main(root: &Path) -> ! {
    let orders = root.join(ORDERS);
    let order = orders.join(ORDER);
    loop {
        let Ok(text) = fs::read_to_string(&order) else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        fs::remove_file(&order).expect("the order can be removed");
        let (name, area) = text.split_once(' ').expect("a task and an area");
        let task = Task::ALL.into_iter().find(|task| task.name() == name);
        let dir = root.join(WORK).join(area);
        let took = perform(task.expect("a known task"), &dir);
        // What the host removes, it keeps for as long as a guest knows it.
        fs::remove_dir_all(&dir).expect("the files of the task");
        let result = format!("{}\n", took.as_nanos());
        fs::write(orders.join(area), result).expect("the result");
    }
}

fn perform(task: Task, area: &Path) -> Duration {
    let mut block = vec![b'x'; BLOCK];
    let started = Instant::now();
    match task {
        Task::Read => {
            let mut file = File::open(area.join(DATA)).expect("the file");
            let mut left = BYTES;
            while left > 0 {
                let got = file.read(&mut block).expect("the file can be read");
                assert!(got > 0, "{left} bytes are missing");
                left -= got;
            }
        }
        Task::Write => {
            let mut file = File::create(area.join(DATA)).expect("a file");
            for _ in 0..BYTES / BLOCK {
                file.write_all(&block).expect("it can be written");
            }
            file.sync_all().expect("it reaches the disk");
        }
        Task::Stat => {
            for n in 0..FILES {
                fs::metadata(area.join(n.to_string())).expect("the file");
            }
        }
        Task::Create => {
            for n in 0..FILES {
                let mut file = File::create(area.join(n.to_string())).expect("a file");
                file.write_all(b"contents\n").expect("it can be written");
            }
        }
    }
    started.elapsed()
}
