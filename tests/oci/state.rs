//! `state`: the OCI state document and runc's additions.

use kuasar_runv_test_harness::{World, json, process};

#[test]
fn state_follows_the_life_of_a_container() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("sleep 1000")
        .with(|c| c["annotations"] = json!({ "org.example.key": "value" }));
    let container = world.create(&bundle, "c");

    let created = container.state();
    assert_eq!(created["status"], "created");
    assert_eq!(created["id"], container.id);
    assert_eq!(created["pid"], container.pid);
    assert_eq!(created["bundle"], bundle.dir().to_str().unwrap());
    assert_eq!(created["rootfs"], bundle.rootfs().to_str().unwrap());
    assert_eq!(created["owner"], "");
    let printed = container.command(&["state"]).ok().stdout();
    let keys: Vec<_> = printed
        .lines()
        .filter_map(|line| line.strip_prefix("  \"")?.split('"').next())
        .collect();
    assert_eq!(
        keys,
        [
            "ociVersion",
            "id",
            "pid",
            "status",
            "bundle",
            "rootfs",
            "created",
            "annotations",
            "owner"
        ]
    );
    assert!(printed.starts_with('{') && printed.ends_with('}'));
    assert_eq!(created["annotations"]["org.example.key"], "value");
    let version = created["ociVersion"].as_str().unwrap();
    assert!(version.starts_with("1."), "{version}");
    let time = created["created"].as_str().unwrap();
    assert!(time.len() >= 20 && time.ends_with('Z'), "RFC 3339: {time}");

    container.start();
    let running = container.state();
    assert_eq!(running["status"], "running");
    assert_eq!(running["pid"], container.pid);
    assert_eq!(running["created"], created["created"]);

    let _ = container.kill("KILL").ok();
    assert_eq!(container.exit_code(), 137);
    container.wait_for_status("stopped");
    let stopped = container.state();
    assert_eq!(stopped["pid"], 0);
    assert!(!process::is_alive(container.pid));
}

#[test]
fn an_unknown_container_has_no_state() {
    let world = World::new();
    let call = world.call(["state"]).arg(world.id("unknown"));
    let out = call.output().fails_with(1, "container does not exist");
    assert_eq!(out.stdout(), "");
}

#[test]
fn state_needs_exactly_one_container() {
    let world = World::new();
    let _ = world.call(["state"]).output().fails_with(1, "");
    let _ = world.call(["state", "a", "b"]).output().fails_with(1, "");
}
