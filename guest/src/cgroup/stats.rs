//! What the kernel counts for a container, read from its cgroup.

use std::fs;
use std::io;
use std::path::Path;

use kuasar_runv_protocol::agent::{
    CpuStats, GetStatsResponse, HugetlbStats, IoStats, MemoryStats, PidsStats,
};
use protobuf::MessageField;

use super::Cgroup;
use super::watch::value_of;

/// What stands for a limit that is not set.
const UNLIMITED: u64 = u64::MAX;
/// Largest number of devices that is reported.
const MAX_DEVICES: usize = 1024;

impl Cgroup {
    /// # Errors
    /// Of reading the files; a controller the kernel does not have is left out.
    pub fn stats(&self) -> io::Result<GetStatsResponse> {
        let dir = self.path();
        Ok(GetStatsResponse {
            cpu: MessageField::some(cpu(dir)?),
            memory: MessageField::some(memory(dir)?),
            pids: MessageField::some(PidsStats {
                current: number(dir, "pids.current")?.unwrap_or(0),
                limit: number(dir, "pids.max")?.unwrap_or(UNLIMITED),
                ..PidsStats::new()
            }),
            io: io_stat(dir)?,
            hugetlb: hugetlb(dir)?,
            cpus: line(dir, "cpuset.cpus.effective")?,
            mems: line(dir, "cpuset.mems.effective")?,
            ..GetStatsResponse::new()
        })
    }
}

fn cpu(dir: &Path) -> io::Result<CpuStats> {
    let stat = text(dir, "cpu.stat")?.unwrap_or_default();
    let of = |key| value_of(&stat, key);
    Ok(CpuStats {
        usage_us: of("usage_usec"),
        user_us: of("user_usec"),
        system_us: of("system_usec"),
        periods: of("nr_periods"),
        throttled_periods: of("nr_throttled"),
        throttled_us: of("throttled_usec"),
        ..CpuStats::new()
    })
}

fn memory(dir: &Path) -> io::Result<MemoryStats> {
    let stat = text(dir, "memory.stat")?.unwrap_or_default();
    Ok(MemoryStats {
        usage: number(dir, "memory.current")?.unwrap_or(0),
        limit: number(dir, "memory.max")?.unwrap_or(UNLIMITED),
        peak: number(dir, "memory.peak")?.unwrap_or(0),
        swap_usage: number(dir, "memory.swap.current")?,
        swap_limit: number(dir, "memory.swap.max")?.unwrap_or(UNLIMITED),
        stat: stat
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
            .collect(),
        ..MemoryStats::new()
    })
}

fn io_stat(dir: &Path) -> io::Result<Vec<IoStats>> {
    let stat = text(dir, "io.stat")?.unwrap_or_default();
    let devices = stat.lines().filter_map(io_device);
    Ok(devices.take(MAX_DEVICES).collect())
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 ...`; a device that was never used has
/// its number only.
fn io_device(line: &str) -> Option<IoStats> {
    let (device, counters) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let of = |key: &str| {
        counters
            .split(' ')
            .filter_map(|counter| counter.split_once('='))
            .find(|(name, _)| *name == key)
            .and_then(|(_, value)| value.parse().ok())
            .unwrap_or(0)
    };
    Some(IoStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        read_bytes: of("rbytes"),
        write_bytes: of("wbytes"),
        reads: of("rios"),
        writes: of("wios"),
        ..IoStats::new()
    })
}

fn hugetlb(dir: &Path) -> io::Result<Vec<HugetlbStats>> {
    let mut sizes = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let size = name
            .to_str()
            .and_then(|name| name.strip_prefix("hugetlb."))
            .and_then(|name| name.strip_suffix(".current"))
            // The same for reservations ends in the same way.
            .filter(|size| !size.contains('.'));
        if let Some(size) = size {
            let events = text(dir, &format!("hugetlb.{size}.events"))?.unwrap_or_default();
            sizes.push(HugetlbStats {
                usage: number(dir, &format!("hugetlb.{size}.current"))?.unwrap_or(0),
                failures: value_of(&events, "max"),
                page_size: size.to_owned(),
                ..HugetlbStats::new()
            });
        }
    }
    Ok(sizes)
}

/// Content of a file; `None` when the kernel has no such file.
fn text(dir: &Path, file: &str) -> io::Result<Option<String>> {
    match fs::read_to_string(dir.join(file)) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound && dir.exists() => Ok(None),
        Err(e) => Err(e),
    }
}

fn line(dir: &Path, file: &str) -> io::Result<String> {
    Ok(text(dir, file)?.unwrap_or_default().trim().to_owned())
}

/// A number; "max" is no limit.
fn number(dir: &Path, file: &str) -> io::Result<Option<u64>> {
    Ok(text(dir, file)?.map(|text| text.trim().parse().unwrap_or(UNLIMITED)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_with_and_without_counters() {
        let used = io_device("254:16 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0").unwrap();
        assert_eq!((used.major, used.minor), (254, 16));
        assert_eq!((used.read_bytes, used.reads, used.writes), (4096, 1, 0));
        assert!(io_device("254:16").is_none());
        assert_eq!(io_device("254:16 ").unwrap().read_bytes, 0);
        assert!(io_device("junk").is_none());
    }
}
