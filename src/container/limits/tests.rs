use serde_json::{Value, json};

use super::*;

const MOST: VmSize = VmSize {
    memory_mib: 512,
    vcpus: 2,
};

fn resources(json: Value) -> Resources {
    serde_json::from_value(json).unwrap()
}

/// What an update writes, as `file=value`; of alternatives the last.
fn written(before: Value, change: Value) -> Result<Vec<String>, Error> {
    let change = resources(change);
    let all = resources(before).with(&change);
    let settings = settings(&all, &change, Some(MOST))?;
    Ok(settings
        .iter()
        .filter_map(|s| s.alternatives.last())
        .map(|w| format!("{}={}", w.file, w.value))
        .collect())
}

#[test]
fn limits_are_translated_as_by_runc() {
    let cases = [
        (json!({"pids": {"limit": 20}}), &["pids.max=20"][..]),
        (json!({"pids": {"limit": -1}}), &["pids.max=max"]),
        (
            json!({"memory": {"limit": 33554432}}),
            &["memory.max=33554432"],
        ),
        (
            json!({"memory": {"limit": -1}}),
            &["memory.swap.max=max", "memory.max=max"],
        ),
        (
            json!({"memory": {"reservation": 4096}}),
            &["memory.low=4096"],
        ),
        (
            json!({"memory": {"limit": 100, "swap": 100}}),
            &["memory.swap.max=0", "memory.max=100"],
        ),
        (json!({"cpu": {"shares": 512}}), &["cpu.weight=20"]),
        (json!({"cpu": {"shares": 2}}), &["cpu.weight=1"]),
        (json!({"cpu": {"shares": 262144}}), &["cpu.weight=10000"]),
        (json!({"cpu": {"quota": 5000}}), &["cpu.max=5000 100000"]),
        (json!({"cpu": {"quota": -1}}), &["cpu.max=max 100000"]),
        (json!({"cpu": {"period": 20000}}), &["cpu.max=max 20000"]),
        (
            json!({"cpu": {"cpus": "0-1", "mems": "0"}}),
            &["cpuset.cpus=0-1", "cpuset.mems=0"],
        ),
        (json!({"cpu": {"idle": 1}}), &["cpu.idle=1"]),
        (json!({"blockIO": {"weight": 1000}}), &["io.weight=10000"]),
        (json!({"blockIO": {"weight": 10}}), &["io.weight=1"]),
        (
            json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}),
            &["hugetlb.2MB.max=0"],
        ),
        (
            json!({"unified": {"memory.high": "1000"}}),
            &["memory.high=1000"],
        ),
        // What engines send for what the user did not mention.
        (
            json!({"memory": {"limit": 0, "swap": 0}, "cpu": {"shares": 0, "quota": 0, "period": 0,
                   "realtimeRuntime": 0, "realtimePeriod": 0, "cpus": "", "mems": ""},
                   "blockIO": {"weight": 0}, "pids": {"limit": 0}}),
            &[],
        ),
    ];
    for (change, expected) in cases {
        assert_eq!(
            written(json!({}), change.clone()).unwrap(),
            expected,
            "{change}"
        );
    }
}

#[test]
fn limits_that_depend_on_each_other_follow() {
    let before = json!({"memory": {"limit": 100, "swap": 300}, "cpu": {"period": 50000}});
    assert_eq!(
        written(before.clone(), json!({"memory": {"limit": 200}})).unwrap(),
        ["memory.swap.max=100", "memory.max=200"]
    );
    assert_eq!(
        written(before.clone(), json!({"cpu": {"quota": 7000}})).unwrap(),
        ["cpu.max=7000 50000"]
    );
    assert_eq!(
        written(before, json!({"memory": {"limit": 400}})),
        Err(Error::SwapBelowMemory)
    );
}

#[test]
fn what_cannot_be_is_refused() {
    let too_much = i64::from(MOST.memory_mib + 1) << 20;
    let cases = [
        (json!({"memory": {"swap": 100}}), "without memory limit"),
        (json!({"memory": {"limit": -5}}), "memory: -5 is negative"),
        (json!({"memory": {"limit": too_much}}), "512 MiB"),
        (json!({"memory": {"limit": too_much}}), "memory_mib"),
        (json!({"cpu": {"cpus": "0-2"}}), "CPU 2 does not exist"),
        (json!({"cpu": {"cpus": "1-0"}}), "cpuset-cpus"),
        (json!({"cpu": {"mems": "a"}}), "cpuset-mems"),
        (json!({"cpu": {"quota": 10}}), "cpu-quota"),
        (json!({"cpu": {"period": 10}}), "cpu-period"),
        (json!({"cpu": {"idle": 2}}), "cpu-idle"),
        (json!({"cpu": {"realtimePeriod": 5000}}), "realtime"),
        (json!({"blockIO": {"weight": 9}}), "blkio-weight"),
        (json!({"unified": {"cgroup.kill": "1"}}), "cgroup.kill"),
        (json!({"unified": {"a/../memory.max": "1"}}), "CONTROLLER"),
    ];
    for (change, expected) in cases {
        let message = written(json!({}), change).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}
