//! `exec`: what its process is, by default, by flags and by `--process`.

use std::fs;

use kuasar_runv_test_harness::{Container, Value, World, json};

fn sleeping(world: &World) -> Container<'_> {
    world.start(&world.bundle().sh("sleep 1000"), "c")
}

/// Capabilities 5, 10 and 29: those of `runc spec`.
const DEFAULT_CAPABILITIES: &str = "0000000020000420";
const FACTS: &str = "echo cwd=$PWD; echo home=$HOME; echo id=$(id -u):$(id -g):$(id -G)
    echo nofile=$(ulimit -n)
    sed -n 's/^\\(Cap[A-Z][a-z]*\\|NoNewPrivs\\|Seccomp\\):\\t/\\1=/p' /proc/self/status
    echo oom=$(cat /proc/self/oom_score_adj)";

fn process_file(world: &World, process: &Value) -> String {
    let path = world.path("process.json");
    fs::write(&path, process.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn the_process_is_like_the_containers_own() {
    let world = World::new();
    let bundle = world.bundle().sh("sleep 1000").with(|c| {
        c["process"]["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [7] });
        c["process"]["cwd"] = json!("/var");
        c["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 77, "hard": 77 }]);
        c["process"]["oomScoreAdj"] = json!(100);
        c["process"]["env"]
            .as_array_mut()
            .unwrap()
            .push(json!("OWN=1"));
    });
    let container = world.start(&bundle, "c");
    let out = container
        .exec_sh(&[], &format!("{FACTS}; echo own=$OWN"))
        .ok();
    assert_eq!(out.fact("cwd"), "/var");
    assert_eq!(out.fact("home"), "/tmp");
    assert_eq!(out.fact("id"), "1000:1000:1000 7");
    assert_eq!(out.fact("nofile"), "77");
    assert_eq!(out.fact("oom"), "100");
    assert_eq!(out.fact("own"), "1");
    assert_eq!(out.fact("NoNewPrivs"), "1");
    assert_eq!(out.fact("CapBnd"), DEFAULT_CAPABILITIES);
    assert_eq!(out.fact("CapEff"), "0000000000000000");
}

#[test]
fn flags_change_the_process() {
    let world = World::new();
    let container = sleeping(&world);
    let flags = ["--cwd", "/tmp", "--user", "1000:5", "-g", "6", "-g", "8"];
    let out = container.exec_sh(&flags, FACTS).ok();
    assert_eq!(out.fact("cwd"), "/tmp");
    assert_eq!(out.fact("home"), "/tmp");
    assert_eq!(out.fact("id"), "1000:5:5 6 8");
    let out = container.exec_sh(&["-u", "1234"], FACTS).ok();
    assert_eq!(out.fact("id"), "1234:0:0");
    assert_eq!(out.fact("home"), "/");
    let flags = [
        "--env", "A=1", "--env", "A=2", "--env", "EMPTY=", "--env", "HOME=/h",
    ];
    let out = container
        .exec_sh(&flags, "echo \"env=$A,${EMPTY-unset},$HOME\"")
        .ok();
    assert_eq!(out.fact("env"), "2,,/h");
}

#[test]
fn capabilities_are_added_and_privileges_allowed() {
    let world = World::new();
    let container = sleeping(&world);
    let out = container.exec_sh(&[], FACTS).ok();
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(out.fact(set), DEFAULT_CAPABILITIES, "{set}");
    }
    let flags = [
        "--cap",
        "CAP_SYS_ADMIN",
        "--cap",
        "CAP_SYS_TIME",
        "--no-new-privs=false",
    ];
    let out = container.exec_sh(&flags, FACTS).ok();
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(out.fact(set), "0000000022200420", "{set}");
    }
    // CVE-2022-29162
    assert_eq!(out.fact("CapInh"), "0000000000000000");
    assert_eq!(out.fact("NoNewPrivs"), "0");
    let out = container.exec_sh(&["--cap", "CAP_NONSENSE"], "exit 0").ok();
    assert!(out.stderr().contains("unknown or unavailable capabilities"));
}

#[test]
fn a_process_file_is_the_whole_process() {
    let world = World::new();
    let container = sleeping(&world);
    let path = process_file(
        &world,
        &json!({
            "cwd": "/var", "args": ["/bin/sh", "-c", FACTS],
            "user": { "uid": 1000, "gid": 1000 },
            "env": ["PATH=/bin"],
            "capabilities": { "bounding": ["CAP_CHOWN"] },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 50, "hard": 50 }],
            "noNewPrivileges": true,
        }),
    );
    let out = container
        .exec_call::<_, &str>(["--process", &path], [])
        .output()
        .ok();
    assert_eq!(out.fact("cwd"), "/var");
    assert_eq!(out.fact("id"), "1000:1000:1000");
    assert_eq!(out.fact("nofile"), "50");
    assert_eq!(out.fact("CapBnd"), "0000000000000001");
    assert_eq!(out.fact("NoNewPrivs"), "1");
}

/// Without capabilities it has the container's, without PATH nothing is found.
#[test]
fn what_a_process_file_leaves_out_is_runcs_default() {
    let world = World::new();
    let container = sleeping(&world);
    let script = format!("export PATH=/bin; {FACTS}");
    let path = process_file(
        &world,
        &json!({ "cwd": "/", "args": ["/bin/sh", "-c", script] }),
    );
    let out = container
        .exec_call::<_, &str>(["-p", &path], [])
        .output()
        .ok();
    assert_eq!(out.fact("CapEff"), DEFAULT_CAPABILITIES);
    assert_eq!(out.fact("NoNewPrivs"), "0");
    assert_eq!(out.fact("home"), "/root");
    let path = process_file(&world, &json!({ "cwd": "/", "args": ["true"] }));
    let out = container.exec_call::<_, &str>(["-p", &path], []).output();
    let _ = out.fails_with(255, "exec: \"true\": executable file not found in $PATH");
}

#[test]
fn mistakes_are_named() {
    let world = World::new();
    let container = sleeping(&world);
    for (flags, words) in [
        (&["--user", "me"][..], "parsing me as int for uid failed"),
        (&["--user", "1:us"], "parsing us as int for gid failed"),
        (
            &["-g", "-3"],
            "additional-gids must be a positive number -3",
        ),
        (
            &["-p", "/nope/process.json"],
            "open /nope/process.json: no such file or directory",
        ),
        (&["-e", "FOO"], "invalid environment variable: \"FOO\""),
        (&["-e", "=x"], "environment variable name can't be empty"),
        (&["--cgroup", "../.."], "is not a sub cgroup path"),
        (&["--cgroup", "nope"], "no such file or directory"),
        (
            &["--process-label", "x"],
            "selinux label is specified in config",
        ),
        (&["--apparmor", "x"], "apparmor failed to apply profile"),
        (&["--detach", "--tty"], "without setting console socket"),
        (&["--console-socket", "/nope"], "cannot use console socket"),
    ] {
        let _ = container.exec_sh(flags, "exit 0").fails_with(255, words);
    }
    for (file, words) in [
        (json!({}), "Cwd property must not be empty"),
        (json!({ "cwd": "/" }), "args must not be empty"),
    ] {
        let path = process_file(&world, &file);
        let out = container.exec_call::<_, &str>(["-p", &path], []).output();
        let _ = out.fails_with(255, words);
    }
}

#[test]
fn the_seccomp_filter_is_the_containers() {
    let world = World::new();
    let bundle = world.bundle().sh("sleep 1000").with(|c| {
        c["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }],
        });
    });
    let container = world.start(&bundle, "c");
    for flags in [
        &["--no-new-privs"][..],
        &["--no-new-privs=false", "--user", "1000"],
    ] {
        let out = container.exec_sh(flags, &format!("{FACTS}; mkdir /tmp/d; echo rc=$?"));
        assert_eq!(out.fact("Seccomp"), "2", "{flags:?}");
        assert_eq!(out.fact("rc"), "1");
        // busybox's words for errno 95.
        assert!(
            out.stderr().contains("Operation not supported"),
            "{}",
            out.stderr()
        );
    }
}

#[test]
fn a_user_namespace_is_entered() {
    let world = World::new();
    let mapping = json!([{ "containerID": 0, "hostID": 100_000, "size": 65536 }]);
    let bundle = world.bundle().sh("sleep 1000").with(|c| {
        let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "user" }));
        c["linux"]["uidMappings"] = mapping.clone();
        c["linux"]["gidMappings"] = mapping;
    });
    let container = world.start(&bundle, "c");
    let script = format!("{FACTS}; echo map=$(cat /proc/self/uid_map)");
    let out = container.exec_sh(&[], &script).ok();
    assert_eq!(out.fact("id"), "0:0:0");
    assert_eq!(out.fact("map").trim(), "0 100000 65536");
    let out = container
        .exec_sh(&["--user", "1000:1000", "-g", "5"], &script)
        .ok();
    assert_eq!(out.fact("id"), "1000:1000:1000 5");
    let _ = container
        .exec_sh(&["--user", "70000"], "exit 0")
        .fails_with(255, "unmapped user in user namespace");
}

#[test]
fn the_file_mode_mask_is_the_callers() {
    let world = World::new();
    let container = sleeping(&world);
    let mut call = container.exec_call::<&str, _>([], ["/bin/sh", "-c", "echo mask=$(umask)"]);
    // SAFETY: umask is async-signal-safe and takes an integer.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(call.command(), || {
            libc::umask(0o027);
            Ok(())
        });
    }
    assert_eq!(call.output().ok().fact("mask"), "0027");
}

/// A directory of the machine that is still open must not become the cwd
/// (CVE-2024-21626).
#[test]
fn no_descriptor_of_the_runtime_leads_out() {
    let world = World::new();
    let container = sleeping(&world);
    for fd in 3..20 {
        let cwd = format!("/proc/self/fd/{fd}");
        let out = container.exec_sh(&["--cwd", &cwd], "ls; exit 0");
        assert_eq!(out.code(), 255, "{cwd}: {}", out.stdout());
    }
}
