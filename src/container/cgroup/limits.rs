//! Limits of the container's cgroup on the host.
//!
//! What the container may use is enforced in the guest. On the host the same limits
//! mean what its users expect of them too, because the virtual CPUs are threads and
//! the guest's memory is memory of processes there. The cgroup of a member of a pod
//! has just its stand-in, and gets the limits as they are. The one that has the VM
//! gets them with room for what the machine itself needs: its memory and its
//! processor time are then bounded by what the container and its machine may cost
//! together, and never by so little that the machine is killed or starved for its
//! own needs.
//!
//! The guest's limits hold without these, so one that cannot be set is a warning.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::container::limits::{cpu_weight, last_of};
use crate::container::resources::Resources;
use crate::container::size::UNLIMITED;

const MIB: i64 = 1 << 20;
/// What the hypervisor, the sandboxer and their page cache may take besides the
/// guest's memory. An emulating QEMU has 256 MiB of translated code.
const VMM_MEMORY: i64 = 512 * MIB;
/// Least limit of a cgroup with a stand-in and those of its execs.
const STANDIN_MEMORY: i64 = 32 * MIB;
/// Processor time the machine itself may take besides the container's quota, in
/// thousandths of a CPU.
const VMM_CPU_MILLIS: u64 = 500;
/// Least shares of a cgroup with a VM: engines give 2 to containers that asked for
/// nothing, with which a busy host would starve the guest's agent.
pub const LEAST_SHARES: u64 = 256;
const DEFAULT_PERIOD: u64 = 100_000;

/// Who is in the cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// A stand-in.
    StandIn,
    /// A stand-in and a VM with so much memory, in MiB.
    Vm { memory_mib: u32 },
}

/// Writes the limits that the container has on the host.
pub fn apply(directories: &[PathBuf], resources: &Resources, holds: Holds) {
    for dir in directories {
        for (file, value) in values(resources, holds) {
            let path = dir.join(file);
            // A hierarchy has the files of its own controllers and version.
            if path.exists() {
                write(&path, &value);
            }
        }
    }
}

/// Raises a limit of memory, if there is one, to what a VM of this size needs.
pub fn fit(directories: &[PathBuf], memory_mib: u32) {
    let needed = vm_memory(memory_mib);
    for dir in directories {
        for file in ["memory.limit_in_bytes", "memory.max"] {
            let path = dir.join(file);
            let now = fs::read_to_string(&path).ok();
            let now = now.and_then(|text| text.trim().parse::<i64>().ok());
            if now.is_some_and(|now| now < needed) {
                write(&path, &needed.to_string());
            }
        }
    }
}

fn write(path: &Path, value: &str) {
    match fs::write(path, value) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => log::warn!("limit {value:?} in {}: {e}", path.display()),
    }
}

/// File names and values, of cgroup v1 and v2.
fn values(resources: &Resources, holds: Holds) -> Vec<(&'static str, String)> {
    let mut values = Vec::new();
    memory(resources, holds, &mut values);
    cpu(resources, holds, &mut values);
    let cpu = &resources.cpu;
    for (file, list) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        if let Some(list) = list.as_ref().filter(|list| last_of(list).is_some()) {
            values.push((file, list.clone()));
        }
    }
    values
}

fn memory(resources: &Resources, holds: Holds, values: &mut Vec<(&'static str, String)>) {
    let limit = match (resources.memory.limit, holds) {
        (None | Some(0), _) => return,
        (Some(limit), _) if !(1..UNLIMITED).contains(&limit) => None,
        (Some(limit), Holds::StandIn) => Some(limit.max(STANDIN_MEMORY)),
        (Some(_), Holds::Vm { memory_mib }) => Some(vm_memory(memory_mib)),
    };
    let (v1, v2) = match limit {
        Some(limit) => (limit.to_string(), limit.to_string()),
        None => ("-1".into(), "max".into()),
    };
    values.push(("memory.limit_in_bytes", v1));
    values.push(("memory.max", v2));
}

fn vm_memory(memory_mib: u32) -> i64 {
    i64::from(memory_mib) * MIB + VMM_MEMORY
}

fn cpu(resources: &Resources, holds: Holds, values: &mut Vec<(&'static str, String)>) {
    let cpu = &resources.cpu;
    if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
        let shares = match holds {
            Holds::StandIn => shares,
            Holds::Vm { .. } => shares.max(LEAST_SHARES),
        };
        values.push(("cpu.shares", shares.to_string()));
        values.push(("cpu.weight", cpu_weight(shares).to_string()));
    }
    if cpu.quota.unwrap_or(0) == 0 && cpu.period.unwrap_or(0) == 0 {
        return;
    }
    let period = cpu.period.filter(|p| *p != 0).unwrap_or(DEFAULT_PERIOD);
    let quota = match u64::try_from(cpu.quota.unwrap_or(0)) {
        Ok(quota @ 1..) => Some(match holds {
            Holds::StandIn => quota,
            Holds::Vm { .. } => quota.saturating_add(period.saturating_mul(VMM_CPU_MILLIS) / 1000),
        }),
        _ => None,
    };
    let (v1, v2) = match quota {
        Some(quota) => (quota.to_string(), quota.to_string()),
        None => ("-1".into(), "max".into()),
    };
    // The period first: a quota is judged by it.
    values.push(("cpu.cfs_period_us", period.to_string()));
    values.push(("cpu.cfs_quota_us", v1));
    values.push(("cpu.max", format!("{v2} {period}")));
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const VM: Holds = Holds::Vm { memory_mib: 512 };

    fn written(resources: Value, holds: Holds) -> Vec<String> {
        let resources = serde_json::from_value(resources).unwrap();
        let values = values(&resources, holds).into_iter();
        values
            .map(|(file, value)| format!("{file}={value}"))
            .collect()
    }

    #[test]
    fn a_stand_in_gets_the_limits_as_they_are() {
        let limits = json!({
            "memory": {"limit": 64 << 20},
            "cpu": {"shares": 512, "quota": 20000, "period": 50000, "cpus": "0-1", "mems": ""},
        });
        assert_eq!(
            written(limits, Holds::StandIn),
            [
                "memory.limit_in_bytes=67108864",
                "memory.max=67108864",
                "cpu.shares=512",
                "cpu.weight=20",
                "cpu.cfs_period_us=50000",
                "cpu.cfs_quota_us=20000",
                "cpu.max=20000 50000",
                "cpuset.cpus=0-1",
            ]
        );
        // It has to fit itself.
        let small = written(json!({"memory": {"limit": 4096}}), Holds::StandIn);
        assert_eq!(small[0], "memory.limit_in_bytes=33554432");
    }

    #[test]
    fn a_vm_gets_room_for_itself() {
        let limits = json!({
            "memory": {"limit": 64 << 20}, "cpu": {"quota": 10000, "shares": 2},
        });
        assert_eq!(
            written(limits, VM),
            [
                "memory.limit_in_bytes=1073741824",
                "memory.max=1073741824",
                "cpu.shares=256",
                "cpu.weight=10",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=60000",
                "cpu.max=60000 100000",
            ]
        );
    }

    #[test]
    fn no_limit_is_none_and_what_was_taken_away_is_taken_away() {
        assert!(written(json!({}), VM).is_empty());
        let without = json!({"memory": {"limit": -1}, "cpu": {"quota": -1}});
        assert_eq!(
            written(without, VM),
            [
                "memory.limit_in_bytes=-1",
                "memory.max=max",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=-1",
                "cpu.max=max 100000",
            ]
        );
    }

    #[test]
    fn only_a_limit_that_is_there_is_raised() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.max");
        let directories = [dir.path().to_owned()];
        for (before, after) in [
            ("max\n", "max\n"),
            ("1000\n", "1073741824"),
            ("9000000000\n", "9000000000\n"),
        ] {
            fs::write(&file, before).unwrap();
            fit(&directories, 512);
            assert_eq!(fs::read_to_string(&file).unwrap(), after);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
