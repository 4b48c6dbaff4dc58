//! What a container asks of the virtual machine's size: by its own limits, or, for
//! the sandbox of a Kubernetes pod, by annotations with the sum of the pod's.

use std::collections::BTreeMap;

use super::limits;
use super::resources::Resources;
use super::state::ContainerRecord;
use crate::config;
use crate::sandbox::size::{Bounds, Demand, Demands, Error};

/// Limits from here on mean "none": engines write the largest number of the
/// cgroup v1 files, 2^63 rounded down to a page.
pub const UNLIMITED: i64 = 1 << 62;
/// Length of a period when nobody says, in microseconds (cgroup-v2.rst).
const DEFAULT_PERIOD: u64 = 100_000;

/// Annotations with the resources of a whole pod: containerd's CRI plugin sets its
/// own from 1.6 on, CRI-O and Kata's users the others.
const MEMORY: [&str; 2] = [
    "io.kubernetes.cri.sandbox-memory",
    "io.kubernetes.cri-o.sandbox-memory",
];
const CPU_QUOTA: [&str; 2] = [
    "io.kubernetes.cri.sandbox-cpu-quota",
    "io.kubernetes.cri-o.sandbox-cpu-quota",
];
const CPU_PERIOD: [&str; 2] = [
    "io.kubernetes.cri.sandbox-cpu-period",
    "io.kubernetes.cri-o.sandbox-cpu-period",
];

/// What the limits of a container ask for.
#[must_use]
pub fn of_limits(resources: &Resources) -> Demand {
    let memory = match resources.memory.limit {
        Some(limit @ 1..UNLIMITED) => limit.unsigned_abs(),
        _ => 0,
    };
    let cpus = resources.cpu.cpus.as_deref().unwrap_or("");
    Demand {
        memory,
        cpu_millis: cpu_millis(
            resources.cpu.quota.unwrap_or(0),
            resources.cpu.period.unwrap_or(0),
        ),
        // A list that is none is refused where it is used.
        named_cpus: limits::last_of(cpus).map_or(0, |last| last.saturating_add(1)),
    }
}

/// What the annotations of a sandbox ask for; those of the wrong form, as for
/// Kubernetes, for nothing.
#[must_use]
pub fn of_annotations(annotations: &BTreeMap<String, String>) -> Demand {
    let number = |keys: [&str; 2]| {
        let mut values = keys.iter().filter_map(|key| annotations.get(*key));
        values.find_map(|value| value.trim().parse::<i64>().ok())
    };
    let memory = number(MEMORY).filter(|bytes| (1..UNLIMITED).contains(bytes));
    let period = number(CPU_PERIOD).and_then(|period| u64::try_from(period).ok());
    Demand {
        memory: memory.map_or(0, i64::unsigned_abs),
        cpu_millis: cpu_millis(number(CPU_QUOTA).unwrap_or(0), period.unwrap_or(0)),
        named_cpus: 0,
    }
}

/// What the size of a new VM for a container follows from.
///
/// # Errors
/// Limits beyond what a VM may have.
pub fn demands(vm: &config::Vm, record: &ContainerRecord) -> Result<Demands, Error> {
    let mut demands = Demands::new(Bounds::of(vm), of_annotations(&record.annotations));
    demands.note(&record.id, of_limits(&record.resources))?;
    Ok(demands)
}

/// Thousandths of a CPU; 0 for no limit.
fn cpu_millis(quota: i64, period: u64) -> u64 {
    let period = if period == 0 { DEFAULT_PERIOD } else { period };
    u64::try_from(quota).map_or(0, |quota| quota.saturating_mul(1000).div_ceil(period))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn demand(resources: serde_json::Value) -> Demand {
        of_limits(&serde_json::from_value(resources).unwrap())
    }

    #[test]
    fn limits_ask_for_memory_and_cpus() {
        let asked = demand(json!({
            "memory": {"limit": 1000}, "cpu": {"quota": 150_000, "cpus": "0,2-3"},
        }));
        assert_eq!(asked.memory, 1000);
        assert_eq!(asked.cpu_millis, 1500);
        assert_eq!(asked.named_cpus, 4);
        let asked = demand(json!({"cpu": {"quota": 1000, "period": 3000}}));
        assert_eq!(asked.cpu_millis, 334);
    }

    #[test]
    fn what_is_no_limit_asks_for_nothing() {
        for nothing in [
            json!({}),
            json!({"memory": {"limit": -1}, "cpu": {"quota": -1, "cpus": ""}}),
            json!({"memory": {"limit": 0}, "cpu": {"quota": 0}}),
            json!({"memory": {"limit": 9_223_372_036_854_771_712_i64}}),
            json!({"cpu": {"cpus": "junk"}}),
        ] {
            assert_eq!(demand(nothing.clone()), Demand::default(), "{nothing}");
        }
    }

    #[test]
    fn annotations_of_a_sandbox_name_the_pods_sum() {
        let annotations = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter();
            of_annotations(&pairs.map(|(k, v)| ((*k).into(), (*v).into())).collect())
        };
        let asked = annotations(&[
            ("io.kubernetes.cri.sandbox-memory", "1073741824"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "300000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
            ("io.kubernetes.cri.sandbox-cpu-shares", "2048"),
        ]);
        assert_eq!((asked.memory, asked.cpu_millis), (1 << 30, 3000));
        // The plugin writes zeros for a pod without limits.
        for (key, value) in [
            ("io.kubernetes.cri.sandbox-memory", "0"),
            ("io.kubernetes.cri.sandbox-memory", "much"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "-1"),
        ] {
            assert_eq!(annotations(&[(key, value)]), Demand::default(), "{key}");
        }
    }
}
