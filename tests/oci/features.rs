//! `features`, `--version`, `--help` and usage errors.

use kuasar_runv_test_harness::{Value, World, json};

#[test]
fn features_is_the_document_of_the_runtime_specification() {
    let world = World::new();
    let out = world.call(["features"]).output().ok();
    let features: Value = serde_json::from_slice(&out.stdout).unwrap();
    for version in ["ociVersionMin", "ociVersionMax"] {
        assert!(
            features[version].as_str().unwrap().starts_with("1."),
            "{version}"
        );
    }
    let has = |pointer: &str, word: &str| {
        let list = features.pointer(pointer).and_then(Value::as_array);
        assert!(
            list.is_some_and(|l| l.iter().any(|v| v == word)),
            "{pointer} has no {word}: {features:#}"
        );
    };
    has("/mountOptions", "rbind");
    has("/mountOptions", "ro");
    for namespace in ["pid", "network", "ipc", "uts", "mount"] {
        has("/linux/namespaces", namespace);
    }
    has("/linux/capabilities", "CAP_KILL");
    has("/linux/seccomp/actions", "SCMP_ACT_ERRNO");
    has("/linux/seccomp/archs", "SCMP_ARCH_X86_64");
}

/// What `features` promises holds: one container with a mount per option.
#[test]
fn every_mount_option_is_accepted() {
    let world = World::new();
    let out = world.call(["features"]).output().ok();
    let features: Value = serde_json::from_slice(&out.stdout).unwrap();
    let options = features["mountOptions"].as_array().unwrap();
    let mut bundle = world.bundle().sh("echo started");
    for (index, option) in options.iter().filter_map(Value::as_str).enumerate() {
        // A mount of its own is neither bound nor mounted again, and runc takes
        // "defaults" for an option of the file system.
        if matches!(option, "bind" | "rbind" | "remount" | "defaults") {
            continue;
        }
        bundle = bundle.mount(json!({
            "destination": format!("/mnt/{index}"), "type": "tmpfs", "source": "tmpfs",
            "options": [option],
        }));
    }
    assert_eq!(world.run(&bundle, "c").ok().stdout(), "started\n");
}

#[test]
fn version_names_the_program_and_the_specification() {
    let world = World::new();
    for flag in ["--version", "-v"] {
        let out = world.bare_call().arg(flag).output().ok().stdout();
        let first = out.lines().next().unwrap();
        assert!(first.contains(" version "), "{first}");
        let spec = out.lines().find_map(|l| l.strip_prefix("spec: ")).unwrap();
        assert!(spec.starts_with("1."), "{spec}");
    }
}

#[test]
fn every_command_has_help() {
    let world = World::new();
    for command in [
        "create", "start", "state", "kill", "delete", "run", "list", "spec", "features", "pause",
        "resume", "update", "events",
    ] {
        let out = world
            .bare_call()
            .args([command, "--help"])
            .output()
            .ok()
            .stdout();
        assert!(out.contains(command), "{out}");
    }
    let create = world
        .bare_call()
        .args(["create", "--help"])
        .output()
        .ok()
        .stdout();
    for flag in [
        "--bundle",
        "--pid-file",
        "--console-socket",
        "--preserve-fds",
        "--no-pivot",
        "--no-new-keyring",
    ] {
        assert!(create.contains(flag), "create --help has no {flag}");
    }
    let global = world.bare_call().arg("--help").output().ok().stdout();
    for flag in [
        "--root",
        "--log",
        "--log-format",
        "--debug",
        "--systemd-cgroup",
        "--rootless",
    ] {
        assert!(global.contains(flag), "--help has no {flag}");
    }
}

#[test]
fn unknown_commands_and_flags_are_errors() {
    let world = World::new();
    for args in [
        &["no-such-command"][..],
        &["list", "--no-such-flag"],
        &["create"],
    ] {
        let out = world.call(args).output();
        assert_ne!(out.code(), 0, "{args:?}");
    }
}

/// Go's flag package: one hyphen is as good as two, switches may have a value, the last
/// of several values counts.
#[test]
fn flags_are_read_as_by_go() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("sleep 1000"), "c");
    let id = container.id.as_str();
    for args in [
        &["list", "-quiet"][..],
        &["list", "--quiet=true"],
        &["list", "-q=1"],
        &["list", "-format", "table", "-format=json", "--quiet=T"],
    ] {
        let out = world.call(args).output().ok();
        assert_eq!(out.stdout(), format!("{id}\n"), "{args:?}");
    }
    let listed = world.call(["-debug=false", "list", "--quiet=false", "-f=json"]);
    assert!(listed.output().ok().stdout().starts_with('['));
    // What follows the container is the program's.
    let out = world.call(["exec", "-cwd", "/tmp", "-env=A=1", id, "sh", "-c"]);
    let out = out.args(["pwd; echo $A $0", "-tty"]).output().ok();
    assert_eq!(out.stdout(), "/tmp\n1 -tty\n");
    let _ = world.call(["kill", "-all=false", id, "KILL"]).output().ok();
    assert_eq!(container.exit_code(), 137);
    let _ = world.call(["delete", id, "-force"]).output().ok();
    world.assert_clean();
}
