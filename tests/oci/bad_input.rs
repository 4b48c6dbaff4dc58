//! Bad input: a clear error, exit code 1, and nothing left behind.

use std::fs;

use kuasar_runv_test_harness::{Bundle, World, json};

/// `create` of this bundle fails with these words and leaves nothing.
#[track_caller]
fn refused(world: &World, bundle: &Bundle, words: &str) {
    let _ = world.try_create(bundle, "c").fails_about(1, words);
    assert!(
        !world.pid_file("c").exists(),
        "a pid file without a process"
    );
    let list = world.call(["list", "-q"]).output().ok();
    assert_eq!(list.stdout(), "");
    world.assert_clean();
}

#[test]
fn a_configuration_that_is_not_json_is_refused() {
    let world = World::new();
    let bundle = world.bundle();
    for bytes in [&b"{ \"ociVersion\": "[..], b"", b"[]", b"\xff\xfe"] {
        bundle.write_config(bytes);
        let out = world.create_call(bundle.dir(), "c").output();
        let out = out.exits_with(1);
        assert!(!out.stderr().is_empty());
        world.assert_clean();
    }
}

#[test]
fn a_missing_configuration_is_named() {
    let world = World::new();
    fs::create_dir(world.path("empty")).unwrap();
    let out = world.create_call(&world.path("empty"), "c").output();
    let _ = out.fails_with(1, "config.json");
    world.assert_clean();
}

#[test]
fn a_missing_bundle_is_an_error() {
    let world = World::new();
    let out = world.create_call(&world.path("missing"), "c").output();
    let _ = out.fails_about(1, "no such file or directory");
    world.assert_clean();
}

#[test]
fn a_missing_rootfs_is_an_error() {
    let world = World::new();
    let bundle = world
        .bundle()
        .with(|c| c["root"]["path"] = json!("no-rootfs"));
    refused(&world, &bundle, "no-rootfs");
}

#[test]
fn a_rootfs_that_is_a_file_is_an_error() {
    let world = World::new();
    let bundle = world
        .bundle()
        .with(|c| c["root"]["path"] = json!("config.json"));
    refused(&world, &bundle, "");
}

#[test]
fn a_missing_process_is_an_error() {
    let world = World::new();
    let bundle = world.bundle().with(|c| {
        c.as_object_mut().unwrap().remove("process");
    });
    refused(&world, &bundle, "");
}

#[test]
fn a_process_without_arguments_is_an_error() {
    let world = World::new();
    let bundle = world.bundle().with(|c| c["process"]["args"] = json!([]));
    refused(&world, &bundle, "args");
}

#[test]
fn a_relative_working_directory_is_an_error() {
    let world = World::new();
    let bundle = world
        .bundle()
        .with(|c| c["process"]["cwd"] = json!("relative"));
    refused(&world, &bundle, "");
}

#[test]
fn an_invalid_id_is_an_error() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0");
    let invalid = "invalid container ID format";
    for (id, words) in [
        ("", "container id cannot be empty"),
        ("a/b", invalid),
        ("..", invalid),
        (".", invalid),
        ("../x", invalid),
        ("a b", invalid),
        ("ä", invalid),
    ] {
        let call = world.call(["create", "--bundle"]).arg(bundle.path());
        let _ = call.arg(id).output().fails_with(1, words);
        let _ = world.call(["state", id]).output().fails_with(1, words);
        world.assert_clean();
    }
}

#[test]
fn an_unusable_namespace_path_is_an_error() {
    let world = World::new();
    for (kind, path) in [
        ("network", "/proc/self/no-such-namespace"),
        ("ipc", "/etc/passwd"),
        ("no-such-kind", ""),
    ] {
        let bundle = world.bundle().sh("exit 0").with(|c| {
            let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|n| n["type"] != kind);
            let mut entry = json!({ "type": kind });
            if !path.is_empty() {
                entry["path"] = json!(path);
            }
            namespaces.push(entry);
        });
        refused(&world, &bundle, "");
    }
}

#[test]
fn a_bind_mount_of_a_missing_source_is_an_error() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("exit 0")
        .bind(&world.path("missing"), "/mnt");
    refused(&world, &bundle, "no such file or directory");
}

#[test]
fn an_unknown_capability_or_rlimit_or_seccomp_action_does_not_pass_silently() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0").with(|c| {
        c["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOSUCH", "soft": 1, "hard": 1 }]);
    });
    refused(&world, &bundle, "RLIMIT_NOSUCH");
    let bundle = world.bundle().sh("exit 0").with(|c| {
        c["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_NOSUCH" });
    });
    refused(&world, &bundle, "SCMP_ACT_NOSUCH");
}
