//! The machine's size: CPUs and memory that the host plugs in while it runs.
//!
//! The kernel takes new memory into use by itself (`memhp_default_state=online`); a
//! new CPU waits until somebody says so. Both appear a little after the host has
//! been told that they are there, because the kernel asks its firmware and devices
//! about them first.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use kuasar_runv_protocol::resources::{GrowRequest, GrowResponse};
use tokio::time::{Instant, sleep};

use crate::sys;

/// How long plugging may take. Under emulation a CPU takes about half a second, and
/// a GiB of memory a tenth.
const DEADLINE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);
/// What the kernel may keep of added memory for itself, as a part of it.
const KEPT: u64 = 32;

const CPUS: &str = "/sys/devices/system/cpu";

#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        source: io::Error,
    },
    #[error(
        "the guest uses {vcpus} CPUs and {memory_kib} KiB after {} s, not {wanted_vcpus} and {wanted_kib}",
        DEADLINE.as_secs()
    )]
    Late {
        vcpus: u32,
        wanted_vcpus: u32,
        memory_kib: u64,
        wanted_kib: u64,
    },
}

/// The machine as it was booted.
#[derive(Debug)]
pub struct Machine {
    booted_kib: u64,
}

impl Machine {
    /// To be called before anything can have been added.
    ///
    /// # Errors
    /// Of sysinfo(2).
    pub fn booted() -> io::Result<Machine> {
        Ok(Machine {
            booted_kib: sys::memory_kib()?,
        })
    }

    /// Waits until what was added is in use.
    ///
    /// # Errors
    /// See [`GrowError`].
    pub async fn grow(&self, request: &GrowRequest) -> Result<GrowResponse, GrowError> {
        let io = |what| move |source| GrowError::Io { what, source };
        let added_kib = u64::from(request.added_memory_mib) << 10;
        let wanted_kib = self.booted_kib + added_kib - added_kib / KEPT;
        let end = Instant::now() + DEADLINE;
        loop {
            let vcpus =
                use_cpus(Path::new(CPUS), request.vcpus).map_err(io("taking a CPU into use"))?;
            let memory_kib = sys::memory_kib().map_err(io("reading the size of the memory"))?;
            if vcpus >= request.vcpus && memory_kib >= wanted_kib {
                return Ok(GrowResponse {
                    vcpus,
                    memory_kib,
                    ..GrowResponse::new()
                });
            }
            if Instant::now() >= end {
                return Err(GrowError::Late {
                    vcpus,
                    wanted_vcpus: request.vcpus,
                    memory_kib,
                    wanted_kib,
                });
            }
            sleep(POLL).await;
        }
    }
}

/// Takes CPUs that are there into use until there are `wanted`, and counts those in
/// use.
fn use_cpus(dir: &Path, wanted: u32) -> io::Result<u32> {
    let mut online = 0;
    let mut waiting = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("cpu"));
        let Some(number) = number.and_then(|number| number.parse::<u32>().ok()) else {
            continue;
        };
        let switch = entry.path().join("online");
        match fs::read_to_string(&switch) {
            Ok(state) if state.trim() == "0" => waiting.push((number, switch)),
            Ok(_) => online += 1,
            // The first CPU has no switch where it cannot be taken away.
            Err(e) if e.kind() == io::ErrorKind::NotFound => online += 1,
            Err(e) => return Err(e),
        }
    }
    // Containers name CPUs by number, so those in use are the first ones.
    waiting.sort_unstable();
    for (_, switch) in waiting {
        if online >= wanted {
            break;
        }
        fs::write(switch, "1")?;
        online += 1;
    }
    Ok(online)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_that_wait_are_taken_into_use() {
        let dir = std::env::temp_dir().join(format!("kuasar-cpus-{}", std::process::id()));
        for (name, online) in [
            ("cpu0", None),
            ("cpu1", Some("1\n")),
            ("cpu3", Some("0\n")),
            ("cpu12", Some("0\n")),
        ] {
            fs::create_dir_all(dir.join(name)).unwrap();
            if let Some(online) = online {
                fs::write(dir.join(name).join("online"), online).unwrap();
            }
        }
        for other in ["cpuidle", "cpu", "hotplug"] {
            fs::create_dir_all(dir.join(other)).unwrap();
        }
        let switch = |name: &str| fs::read_to_string(dir.join(name).join("online")).unwrap();
        assert_eq!(use_cpus(&dir, 1).unwrap(), 2);
        assert_eq!(use_cpus(&dir, 3).unwrap(), 3);
        assert_eq!(switch("cpu3"), "1");
        assert_eq!(switch("cpu12"), "0\n");
        assert_eq!(use_cpus(&dir, 9).unwrap(), 4);
        assert_eq!(switch("cpu12"), "1");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn the_size_of_the_memory_is_read() {
        let text = fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
        let total: u64 = line
            .unwrap()
            .trim()
            .strip_suffix(" kB")
            .unwrap()
            .parse()
            .unwrap();
        assert_eq!(sys::memory_kib().unwrap(), total);
    }
}
