//! `linux.resources` beyond the everyday limits of `resources.rs`. The files are those of
//! cgroup v2, in the guest; a runtime of a host with cgroup v1 has others, and is left out.

use std::path::Path;

use kuasar_runv_test_harness::{Value, World, json};

/// The guest has cgroup v2; so has the host of another runtime that is tested here, or
/// its limits have other names.
fn has_v2(world: &World) -> bool {
    world.runtime.is_ours || Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// Facts `file=content` of the container's cgroup, under these resources.
fn show(world: &World, files: &[&str], resources: Value) -> kuasar_runv_test_harness::Output {
    let script: String = files
        .iter()
        .map(|file| format!("echo {file}=$(cat /sys/fs/cgroup/{file})\n"))
        .collect();
    let bundle = world.bundle().sh(&script).with(|c| {
        let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "cgroup" }));
        for (key, value) in resources.as_object().unwrap() {
            c["linux"]["resources"][key] = value.clone();
        }
    });
    world.run(&bundle, "c").ok()
}

#[test]
fn limits_become_those_of_cgroup_v2() {
    let world = World::new();
    if !has_v2(&world) {
        return;
    }
    let files = [
        "cpu.max",
        "cpu.max.burst",
        "cpu.idle",
        "memory.max",
        "memory.low",
        "memory.swap.max",
        "pids.max",
        "hugetlb.2MB.max",
    ];
    let out = show(
        &world,
        &files,
        json!({
            "cpu": { "quota": 20000, "period": 50000, "burst": 1000, "idle": 0 },
            "memory": { "limit": 64 << 20, "reservation": 32 << 20, "swap": 128 << 20,
                        "useHierarchy": true, "disableOOMKiller": false },
            "pids": { "limit": -1 },
            "hugepageLimits": [{ "pageSize": "2MB", "limit": 4_194_304 }],
        }),
    );
    assert_eq!(out.fact("cpu.max"), "20000 50000");
    assert_eq!(out.fact("cpu.max.burst"), "1000");
    assert_eq!(out.fact("cpu.idle"), "0");
    assert_eq!(out.fact("memory.max"), (64 << 20).to_string());
    assert_eq!(out.fact("memory.low"), (32 << 20).to_string());
    // In config.json the sum of memory and swap.
    assert_eq!(out.fact("memory.swap.max"), (64 << 20).to_string());
    assert_eq!(out.fact("pids.max"), "max");
    assert_eq!(out.fact("hugetlb.2MB.max"), "4194304");
}

#[test]
fn unified_values_are_written_as_they_are() {
    let world = World::new();
    if !has_v2(&world) {
        return;
    }
    let unified = json!({ "memory.high": "52428800", "pids.max": "33", "cpu.weight": "77" });
    let out = show(
        &world,
        &["memory.high", "pids.max", "cpu.weight"],
        json!({ "unified": unified }),
    );
    assert_eq!(out.fact("memory.high"), "52428800");
    assert_eq!(out.fact("pids.max"), "33");
    assert_eq!(out.fact("cpu.weight"), "77");
}

#[test]
fn limits_that_cannot_be_are_refused() {
    let world = World::new();
    if !has_v2(&world) {
        return;
    }
    for (resources, words) in [
        (
            json!({ "unified": { "../x": "1" } }),
            "must be a file name (no slashes)",
        ),
        (json!({ "unified": { "nope.max": "1" } }), "nope"),
        (
            json!({ "hugepageLimits": [{ "pageSize": "3MB", "limit": 1 }] }),
            "page size",
        ),
        (json!({ "memory": { "swap": 1 << 20 } }), "swap"),
    ] {
        let bundle = world.bundle().sh("exit 0").with(|c| {
            for (key, value) in resources.as_object().unwrap() {
                c["linux"]["resources"][key] = value.clone();
            }
        });
        let _ = world.try_create(&bundle, "c").fails_about(1, words);
        world.assert_clean();
    }
}

/// Of the machine the container runs on: the virtual one, here with one processor.
#[test]
fn processors_that_do_not_exist_are_refused() {
    let world = World::new();
    for cpus in ["0-8000", "junk"] {
        let bundle = world.bundle().sh("exit 0");
        let bundle = bundle.with(|c| c["linux"]["resources"]["cpu"] = json!({ "cpus": cpus }));
        let out = world.try_create(&bundle, "c").fails_with(1, cpus);
        if world.runtime.is_ours {
            assert!(
                out.stderr().contains("resources.cpu.cpus"),
                "{}",
                out.stderr()
            );
        }
        world.assert_clean();
    }
}
