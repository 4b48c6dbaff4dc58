//! `events`.

use std::io::{BufRead, BufReader};
use std::time::Instant;

use kuasar_runv_test_harness::{Value, World, json};

#[test]
fn stats_have_the_structure_of_runcs() {
    let world = World::new();
    let bundle = world.bundle().sh("echo ready; sleep 1000").with(|c| {
        c["linux"]["resources"]["memory"] = json!({ "limit": 64 << 20 });
        c["linux"]["resources"]["pids"] = json!({ "limit": 30 });
    });
    let container = world.start(&bundle, "c");
    container.wait_for_output("ready");
    let out = container.command(&["events", "--stats"]).ok().stdout();
    assert_eq!(out.lines().count(), 1, "{out}");
    let event: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(event["type"], "stats");
    assert_eq!(event["id"], container.id);
    let data = event["data"].as_object().unwrap();
    let keys: Vec<_> = data.keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        [
            "blkio",
            "cpu",
            "cpuset",
            "hugetlb",
            "intel_rdt",
            "memory",
            "network_interfaces",
            "pids"
        ]
    );
    let at = |pointer: &str| {
        event["data"]
            .pointer(pointer)
            .and_then(Value::as_u64)
            .unwrap_or_else(|| panic!("no {pointer} in {out}"))
    };
    assert_eq!(at("/memory/usage/limit"), 64 << 20);
    assert!(at("/memory/usage/usage") > 0);
    assert!(at("/memory/usage/max") >= at("/memory/usage/usage"));
    assert!(at("/memory/swap/usage") >= at("/memory/usage/usage"));
    assert_eq!(at("/memory/kernelTCP/failcnt"), 0);
    assert!(at("/memory/raw/pgfault") > 0);
    assert_eq!(at("/pids/limit"), 30);
    assert!(at("/pids/current") > 0);
    assert!(at("/cpu/usage/total") > 0);
    assert!(event["data"]["cpu"]["throttling"].is_object());
    assert_eq!(event["data"]["cpuset"]["cpus"][0], 0);
    assert_eq!(event["data"]["network_interfaces"], Value::Null);
}

/// A container that takes more memory than it may is killed, and `events` says so.
#[test]
fn events_report_statistics_and_kills_for_lack_of_memory() {
    let world = World::new();
    let limit = |c: &mut Value| c["linux"]["resources"]["memory"] = json!({ "limit": 48 << 20 });
    let bundle = world.bundle().probe("memory 200").with(limit);
    let container = world.create(&bundle, "c");
    let call = world.call(["events", "--interval", "500ms", &container.id]);
    let mut events = call.stdout_pipe().spawn();
    let mut lines = BufReader::new(events.stdout.take().unwrap()).lines();
    let mut next = || {
        let line = lines.next()?.unwrap();
        Some(serde_json::from_str::<Value>(&line).unwrap())
    };
    // One is there, so `events` listens.
    assert_eq!(next().unwrap()["type"], "stats");
    container.start();
    assert_eq!(container.exit_code(), 137);
    container.wait_for_status("stopped");
    let _ = container.delete().ok();
    let id = &container.id;
    // It ends by itself.
    let rest: Vec<Value> = std::iter::from_fn(next).collect();
    let oom = json!({ "type": "oom", "id": id });
    assert!(rest.contains(&oom), "{rest:?}");
    let _ = events.wait().ok();
}

#[test]
fn events_go_on_while_a_container_is_paused() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("echo ready; sleep 1000"), "c");
    container.wait_for_output("ready");
    let _ = container.command(&["pause"]).ok();
    let _ = container.command(&["events", "--stats"]).ok();
    let call = world.call(["events", "--interval=200ms", &container.id]);
    let started = Instant::now();
    let mut events = call.stdout_pipe().spawn();
    let mut lines = BufReader::new(events.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        assert!(lines.next().unwrap().unwrap().contains("\"stats\""));
    }
    assert!(started.elapsed().as_millis() >= 400);
    // Nobody reads any more.
    drop(lines);
    let _ = container.command(&["resume"]).ok();
    assert_eq!(container.status(), "running");
}

#[test]
fn a_container_that_does_not_run_has_no_events() {
    let world = World::new();
    let id = world.id("unknown");
    for args in [&["events"][..], &["events", "--stats"]] {
        let call = world.call(args).arg(&id);
        let _ = call.output().fails_with(1, "container does not exist");
    }
    let container = world.start(&world.bundle().sh("exit 0"), "c");
    let _ = container
        .command(&["events", "--interval", "0s"])
        .fails_with(1, "duration interval must be greater than 0");
    let _ = container
        .command(&["events", "--interval", "often"])
        .fails_about(1, "interval");
    assert_eq!(container.exit_code(), 0);
    container.wait_for_status("stopped");
    let words = format!("container with id {} is not running", container.id);
    let _ = container.command(&["events"]).fails_with(1, &words);
    let _ = container
        .command(&["events", "--stats"])
        .fails_with(1, &words);
}
