//! What runs in a container, as proc(5) tells it.

use std::fs;
use std::io::Read;

use kuasar_runv_protocol::agent::{ListProcessesResponse, ProcessInfo};
use kuasar_runv_protocol::{MAX_ARGS_LEN, MAX_PROCESSES};

use super::{ContainerError, Containers, Result};
use crate::sys;

/// After so many processes others have a turn on the agent's one thread.
const BATCH: usize = 16;

impl Containers {
    /// Lists the processes of a container's cgroup; those that end meanwhile are
    /// left out.
    ///
    /// # Errors
    /// `NotFound`, `Busy`.
    pub async fn list_processes(&self, id: &str) -> Result<ListProcessesResponse> {
        let container = self.get(id)?;
        let pids = container
            .cgroup
            .pids()
            .map_err(ContainerError::io("listing the cgroup"))?;
        let mut answer = ListProcessesResponse {
            truncated: pids.len() > MAX_PROCESSES,
            memory_kib: memory_kib(),
            ..ListProcessesResponse::new()
        };
        for (number, pid) in pids.into_iter().take(MAX_PROCESSES).enumerate() {
            answer.processes.extend(describe(pid));
            if number % BATCH == BATCH - 1 {
                tokio::task::yield_now().await;
            }
        }
        Ok(answer)
    }
}

/// `None` when it has ended.
fn describe(pid: i32) -> Option<ProcessInfo> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut info = parse_stat(&stat)?;
    info.args = arguments(pid).unwrap_or_default();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    parse_status(&status, &mut info);
    Some(info)
}

/// `/proc/PID/stat`; the name is in parentheses and may contain any character.
fn parse_stat(stat: &str) -> Option<ProcessInfo> {
    let (pid, rest) = stat.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // Numbered as in proc(5), where the state is field 3.
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or_default();
    let number = |n: usize| field(n).parse::<i64>().unwrap_or_default();
    let unsigned = |n: usize| field(n).parse::<u64>().unwrap_or_default();
    let small = |n: usize| i32::try_from(number(n)).unwrap_or_default();
    let count = |n: usize| u32::try_from(unsigned(n)).unwrap_or_default();
    let start_ms = ticks_to_ms(unsigned(22));
    Some(ProcessInfo {
        pid: pid.parse().ok()?,
        name: name.to_owned(),
        state: field(3).to_owned(),
        ppid: small(4),
        pgid: small(5),
        sid: small(6),
        tty: number(7).cast_unsigned() as u32,
        tpgid: small(8),
        flags: count(9),
        cpu_ms: ticks_to_ms(unsigned(14) + unsigned(15)),
        priority: small(18),
        nice: small(19),
        threads: count(20),
        age_ms: (sys::boottime_us() / 1000).saturating_sub(start_ms),
        vsize_kib: unsigned(23) / 1024,
        rss_kib: unsigned(24) * 4,
        processor: count(39),
        rt_priority: count(40),
        policy: count(41),
        ..ProcessInfo::new()
    })
}

fn ticks_to_ms(ticks: u64) -> u64 {
    // USER_HZ is 100 on every architecture this runs on.
    ticks.saturating_mul(10)
}

fn parse_status(status: &str, info: &mut ProcessInfo) {
    for line in status.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let mut ids = value
            .split_ascii_whitespace()
            .map(|id| id.parse().unwrap_or(0));
        match key {
            "Uid" => (info.ruid, info.euid) = (ids.next().unwrap_or(0), ids.next().unwrap_or(0)),
            "Gid" => (info.rgid, info.egid) = (ids.next().unwrap_or(0), ids.next().unwrap_or(0)),
            "VmLck" => info.locked = ids.next().unwrap_or(0) > 0,
            _ => {}
        }
    }
}

/// What there is of the command line, up to the bound. The process can make it
/// any length.
fn arguments(pid: i32) -> Option<Vec<u8>> {
    let file = fs::File::open(format!("/proc/{pid}/cmdline")).ok()?;
    let mut bytes = Vec::new();
    file.take(MAX_ARGS_LEN as u64)
        .read_to_end(&mut bytes)
        .ok()?;
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    Some(bytes)
}

fn memory_kib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|value| value.split_ascii_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_contain_anything() {
        let stat = "42 (a) (b 1) S 7 42 43 34816 44 4194560 1 2 3 4 150 50 7 8 20 -5 3 0 200 \
                    8192000 256 18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0";
        let info = parse_stat(stat).unwrap();
        assert_eq!(info.name, "a) (b 1");
        assert_eq!((info.pid, info.ppid, info.sid), (42, 7, 43));
        assert_eq!((info.tty, info.tpgid), (34816, 44));
        assert_eq!((info.cpu_ms, info.nice, info.threads), (2000, -5, 3));
        assert_eq!((info.vsize_kib, info.rss_kib), (8000, 1024));
    }

    #[test]
    fn this_process_is_described() {
        let me = describe(std::process::id().try_into().unwrap()).unwrap();
        // SAFETY: no arguments, cannot fail.
        assert_eq!(me.euid, unsafe { libc::geteuid() });
        assert!(!me.args.is_empty());
        assert!(describe(i32::MAX).is_none());
    }
}
