//! What a virtual machine cannot give is refused by `create`, in words that say what.

use std::fs;

use kuasar_runv_test_harness::{Bundle, World, json};

#[track_caller]
fn refused(world: &World, bundle: &Bundle, words: &str) {
    let _ = world.try_create(bundle, "c").fails_with(1, words);
    world.assert_clean();
}

#[test]
fn the_hosts_network_is_refused() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0").namespace("network", None);
    refused(&world, &bundle, "network");
}

#[test]
fn namespaces_of_foreign_processes_are_refused() {
    let world = World::new();
    for kind in ["pid", "ipc", "uts", "mnt"] {
        let path = format!("/proc/{}/ns/{kind}", std::process::id());
        let name = if kind == "mnt" { "mount" } else { kind };
        let bundle = world.bundle().sh("exit 0").namespace(name, Some(&path));
        refused(&world, &bundle, &path);
    }
}

#[test]
fn descriptors_cannot_be_preserved() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0");
    let call = world.call(["create", "--preserve-fds", "2", "--bundle"]);
    let call = call.arg(bundle.path()).arg(world.id("c"));
    let _ = call.output().fails_with(1, "preserve-fds");
    world.assert_clean();
}

#[test]
fn an_unknown_file_system_is_refused() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0").mount(json!({
        "destination": "/x", "type": "no-such-file-system", "source": "none",
    }));
    refused(&world, &bundle, "no-such-file-system");
}

/// The library that makes containers in the guest must not change the id of the
/// container, whatever it contains.
#[test]
fn unusual_but_valid_ids_work() {
    let world = World::new();
    let bundle = world.bundle().sh("echo out");
    let long = "x".repeat(200 - world.name().len());
    for name in ["with.dots", "with_underscores", "plus+plus", &long] {
        let out = world.run(&bundle, name).ok();
        assert_eq!(out.stdout(), "out\n", "{name}");
    }
    assert!(fs::read_dir(world.root.join("containers")).is_ok_and(|mut d| d.next().is_none()));
}
