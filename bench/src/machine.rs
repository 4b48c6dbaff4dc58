//! Where and when the figures were taken.

use std::fs;
use std::process::Command;
use std::thread::available_parallelism;
use std::time::{SystemTime, UNIX_EPOCH};

/// Lines of the form `name: value`.
pub fn describe() -> Vec<(&'static str, String)> {
    let processors = available_parallelism().map_or(0, usize::from);
    vec![
        ("date", date()),
        ("processor", format!("{processors} x {}", processor())),
        ("memory", memory()),
        ("host kernel", first_line("/proc/sys/kernel/osrelease")),
        ("hypervisor", version("qemu-system-x86_64")),
        ("runc", version("runc")),
        ("crun", version("crun")),
        ("load before", load()),
    ]
}

fn first_line(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(": "))
        .map_or_else(|| "unknown".into(), |(_, name)| name.to_owned())
}

fn memory() -> String {
    let text = first_line("/proc/meminfo");
    let kib: u64 = text
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    format!("{} MiB", kib >> 10)
}

fn load() -> String {
    first_line("/proc/loadavg")
        .split(' ')
        .next()
        .unwrap_or("unknown")
        .to_owned()
}

/// First line of `program --version`. Called before anything else waits for
/// children.
fn version(program: &str) -> String {
    match Command::new(program).arg("--version").output() {
        Ok(out) => String::from_utf8_lossy(&out.stdout)
            .lines()
            .next()
            .unwrap_or("")
            .to_owned(),
        Err(_) => "not installed".into(),
    }
}

fn date() -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let seconds = libc::time_t::try_from(now).unwrap_or(0);
    // SAFETY: an all-zero tm is a valid value of the C struct; both outlive the call.
    let tm = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        libc::gmtime_r(&seconds, &mut tm);
        tm
    };
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02} UTC",
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min
    )
}
