//! `linux.resources`: limits hold for the container.

use kuasar_runv_test_harness::{Bundle, World, json};

/// A bundle whose container sees its own cgroup as the root of the hierarchy.
fn own_cgroup(world: &World) -> Bundle {
    world.bundle().with(|c| {
        let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "cgroup" }));
    })
}

/// Prints a controller's file, of cgroup v2 or of v1 (file names differ).
fn show(key: &str, v2: &str, v1: &str) -> String {
    let base = "/sys/fs/cgroup";
    format!("echo {key}=$(cat {base}/{v2} 2>/dev/null || cat {base}/{v1} 2>/dev/null)\n")
}

#[test]
fn a_limit_of_processes_holds() {
    let world = World::new();
    let script = show("max", "pids.max", "pids/pids.max")
        + "for n in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & done; echo after=$(jobs | wc -l)";
    let bundle = own_cgroup(&world).sh(&script);
    let bundle = bundle.with(|c| c["linux"]["resources"]["pids"] = json!({ "limit": 10 }));
    let out = world.run(&bundle, "c");
    assert_eq!(out.fact("max"), "10");
    assert!(
        out.stderr().contains("Resource temporarily unavailable"),
        "{}",
        out.stderr()
    );
    assert_ne!(out.code(), 0);
}

#[test]
fn a_limit_of_memory_kills_what_exceeds_it() {
    let world = World::new();
    let limit = |c: &mut kuasar_runv_test_harness::Value| {
        c["linux"]["resources"]["memory"] = json!({ "limit": 48 << 20 });
    };
    let script = show("max", "memory.max", "memory/memory.limit_in_bytes");
    let out = world
        .run(&own_cgroup(&world).sh(&script).with(limit), "show")
        .ok();
    assert_eq!(out.fact("max"), (48 << 20).to_string());
    let bundle = own_cgroup(&world).probe("memory 20").with(limit);
    assert_eq!(world.run(&bundle, "below").ok().fact("all"), "20");
    let bundle = own_cgroup(&world).probe("memory 200").with(limit);
    let out = world.run(&bundle, "above").exits_with(137);
    assert!(out.stdout().contains("touched=20\n"), "{}", out.stdout());
    assert!(!out.stdout().contains("touched=60\n"), "{}", out.stdout());
}

#[test]
fn cpu_limits_are_set() {
    let world = World::new();
    let script = show("quota", "cpu.max", "cpu/cpu.cfs_quota_us")
        + &show("cpus", "cpuset.cpus", "cpuset/cpuset.cpus")
        + &show("shares", "cpu.weight", "cpu/cpu.shares")
        + &show("weight", "io.weight", "blkio/blkio.bfq.weight");
    let bundle = own_cgroup(&world).sh(&script).with(|c| {
        c["linux"]["resources"]["blockIO"] = json!({ "weight": 500 });
        c["linux"]["resources"]["cpu"] =
            json!({ "quota": 20000, "period": 50000, "shares": 512, "cpus": "0" });
    });
    let out = world.run(&bundle, "c").ok();
    let quota = out.fact("quota");
    assert!(
        ["20000 50000", "20000"].contains(&quota.as_str()),
        "{quota}"
    );
    assert_eq!(out.fact("cpus"), "0");
    // 512 of v1 is 20 of v2 (1 + (512 - 2) * 9999 / 262142), or 59 by the newer
    // formula of crun and runc that maps 1024 to 100.
    let shares = out.fact("shares");
    assert!(["20", "59", "512"].contains(&shares.as_str()), "{shares}");
    // 500 of v1 is 4950 of v2 (1 + (500 - 10) * 9999 / 990). A kernel may have neither.
    let weight = out.fact("weight");
    assert!(
        ["default 4950", "500", ""].contains(&weight.as_str()),
        "{weight}"
    );
}
