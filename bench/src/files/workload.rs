//! The part that runs inside the guests.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Environment variable that makes this binary the workload; the directory.
pub const VARIABLE: &str = "KUASAR_RUNV_BENCH_FILES";
/// What the host wants next.
pub const ORDER: &str = "order";
/// Tag and mount point of the directory, when this binary is an init.
pub const TAG: &str = "kuasar-share";
const MOUNT_POINT: &str = "/run";

/// Of one file that is read or written.
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

/// The directory to work in, if that is what this process is for. As the init of a
/// machine it has no environment of ours, and mounts the directory first.
pub fn directory() -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os(VARIABLE) {
        return Some(dir.into());
    }
    let is_init = std::process::id() == 1 && !Path::new("/proc/self").exists();
    is_init.then(mount)
}

fn mount() -> PathBuf {
    let c = |text: &str| std::ffi::CString::new(text).expect("no NUL");
    let (tag, place, kind) = (c(TAG), c(MOUNT_POINT), c("virtiofs"));
    // SAFETY: C strings that outlive the call; the file system takes no data.
    let rc = unsafe {
        libc::mount(
            tag.as_ptr(),
            place.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    assert_eq!(rc, 0, "virtiofs: {}", std::io::Error::last_os_error());
    MOUNT_POINT.into()
}

/// Does what it is told, for ever.
pub fn main(dir: &Path) -> ! {
    loop {
        let order = dir.join(ORDER);
        let Ok(text) = fs::read_to_string(&order) else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        fs::remove_file(&order).expect("the order can be removed");
        let (name, area) = text.split_once(' ').expect("a task and an area");
        let task = Task::ALL.into_iter().find(|task| task.name() == name);
        let area = dir.join(area);
        let took = perform(task.expect("a known task"), &area);
        let result = format!("{}\n", took.as_nanos());
        fs::write(area.with_extension("result"), result).expect("the result");
    }
}

fn perform(task: Task, area: &Path) -> Duration {
    let mut block = vec![b'x'; BLOCK];
    let started = Instant::now();
    match task {
        Task::Read => {
            let mut file = File::open(area.join("data")).expect("the file");
            let mut left = BYTES;
            while left > 0 {
                let got = file.read(&mut block).expect("the file can be read");
                assert!(got > 0, "{left} bytes are missing");
                left -= got;
            }
        }
        Task::Write => {
            let mut file = File::create(area.join("data")).expect("a file");
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
