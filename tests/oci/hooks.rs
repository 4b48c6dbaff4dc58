//! `hooks`: when each of the six kinds runs, where, with what, and what its failure does.
//!
//! runc 1.1 runs `poststart` before `create` returns, against the specification; what
//! depends on that is only tested with runtimes that follow it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::{Bundle, Container, Value, World, json, process};

/// A hook that runs a shell script of the host.
fn sh(script: &str) -> Value {
    json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["KEY=value"] })
}

fn with_hook(bundle: Bundle, kind: &str, hook: Value) -> Bundle {
    bundle.with(|c| {
        let hooks = &mut c["hooks"];
        if hooks.is_null() {
            *hooks = json!({});
        }
        if hooks[kind].is_null() {
            hooks[kind] = json!([]);
        }
        hooks[kind].as_array_mut().unwrap().push(hook);
    })
}

/// A bundle of which each hook of the host appends its kind, its state and more to `log`.
fn logging(world: &World, log: &Path) -> Bundle {
    let mut bundle = world.bundle().sh("sleep 1000").with(|c| {
        c["annotations"] = json!({ "krt.test": "one" });
    });
    for kind in [
        "prestart",
        "createRuntime",
        "createContainer",
        "poststart",
        "poststop",
    ] {
        let log = log.display();
        let script = format!(
            "echo {kind} $(cat) >>{log}; echo {kind}-env $(env) >>{log}
            echo {kind}-cwd $(pwd) >>{log}"
        );
        bundle = with_hook(bundle, kind, sh(&script));
    }
    bundle
}

/// What follows the first word `key` in the log.
fn entry(log: &Path, key: &str) -> Option<String> {
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines()
        .find_map(|line| Some(line.strip_prefix(key)?.strip_prefix(' ')?.to_owned()))
}

fn state(log: &Path, kind: &str) -> Option<Value> {
    entry(log, kind).map(|text| serde_json_from(&text))
}

fn serde_json_from(text: &str) -> Value {
    text.parse().unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn check_state(log: &Path, kind: &str, status: &str, container: &Container, bundle: &Path) {
    let state = state(log, kind).unwrap_or_else(|| panic!("{kind} has not run"));
    assert_eq!(state["id"], json!(container.id), "{kind}");
    assert_eq!(state["status"], json!(status), "{kind}");
    assert_eq!(state["bundle"], json!(bundle), "{kind}");
    assert_eq!(state["annotations"], json!({ "krt.test": "one" }), "{kind}");
    assert!(state["ociVersion"].is_string(), "{kind}");
    let env = entry(log, &format!("{kind}-env")).unwrap();
    // The shell adds PWD and its like.
    assert!(
        env.contains("KEY=value") && !env.contains("KRT"),
        "{kind}: {env}"
    );
}

#[test]
fn each_hook_of_the_host_runs_once_at_its_time_with_its_state() {
    let world = World::new();
    let log = world.path("log");
    let bundle = logging(&world, &log);
    let container = world.create(&bundle, "c");
    let dir = bundle.dir();
    for kind in ["prestart", "createRuntime", "createContainer"] {
        check_state(&log, kind, "creating", &container, dir);
    }
    for kind in ["prestart", "createRuntime"] {
        assert_eq!(state(&log, kind).unwrap()["pid"], json!(container.pid));
        let cwd = entry(&log, &format!("{kind}-cwd")).unwrap();
        assert_eq!(Path::new(&cwd), dir);
    }
    let cwd = entry(&log, "createContainer-cwd").unwrap();
    assert_eq!(Path::new(&cwd), bundle.rootfs());
    if world.runtime.is_ours {
        assert_eq!(state(&log, "poststart"), None, "the program has not run");
    }
    assert_eq!(state(&log, "poststop"), None);

    container.start();
    let poststart = state(&log, "poststart").unwrap();
    assert_eq!(poststart["pid"], json!(container.pid));
    if world.runtime.is_ours {
        check_state(&log, "poststart", "running", &container, dir);
    }
    let _ = container.kill("KILL").ok();
    container.wait_for_status("stopped");
    assert_eq!(state(&log, "poststop"), None);
    // What delete needs is on record: the bundle may be gone.
    fs::rename(dir, world.path("moved")).unwrap();
    let _ = container.delete().ok();
    check_state(&log, "poststop", "stopped", &container, dir);
    assert!(state(&log, "poststop").unwrap()["pid"].is_null());
    let text = fs::read_to_string(&log).unwrap();
    let kinds: Vec<_> = text.lines().filter(|l| l.contains('{')).collect();
    assert_eq!(kinds.len(), 5, "{text}");
}

/// docker's libnetwork hook hands `/proc/PID/ns/net` on.
#[test]
fn the_namespaces_of_the_state_are_there_before_the_container_runs() {
    let world = World::new();
    let link = world.path("netns");
    let script = format!(
        "pid=$(cat | sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); readlink /proc/$pid/ns/net >{0}
        ip link show lo >/dev/null 2>&1; ls /proc/$pid/ns | tr '\\n' ' ' >>{0}",
        link.display()
    );
    let bundle = with_hook(world.bundle().sh("sleep 1000"), "prestart", sh(&script));
    let container = world.create(&bundle, "c");
    let text = fs::read_to_string(&link).unwrap();
    let seen = text.lines().next().unwrap();
    let now = fs::read_link(format!("/proc/{}/ns/net", container.pid)).unwrap();
    assert_eq!(Path::new(seen), now);
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(now, own);
    assert!(text.contains("mnt") && text.contains("uts"), "{text}");
}

/// The container's mounts are in place, the host's root is still there, and what
/// the hook mounts stays in the namespaces of the container.
#[test]
fn create_container_hooks_run_in_the_containers_mount_namespace() {
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "of the volume\n").unwrap();
    let log = world.path("log");
    let bundle = world.bundle().sh("cat /made-by-hook").bind(&volume, "/vol");
    fs::create_dir(bundle.rootfs().join("mnt")).unwrap();
    let script = format!(
        "cat vol/file >{0}; echo hello >made-by-hook; mount -t tmpfs krt mnt && touch mnt/x
        readlink /proc/self/ns/mnt /proc/self/ns/uts >>{0}",
        log.display()
    );
    let bundle = with_hook(bundle, "createContainer", sh(&script));
    let container = world.create(&bundle, "c");
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "of the volume");
    for (line, kind) in [(lines[1], "mnt"), (lines[2], "uts")] {
        let standin = fs::read_link(format!("/proc/{}/ns/{kind}", container.pid)).unwrap();
        assert_eq!(Path::new(line), standin);
    }
    assert!(
        !bundle.rootfs().join("mnt/x").exists(),
        "the host sees the mount"
    );
    container.start();
    assert_eq!(container.exit_code(), 0);
    assert_eq!(container.stdout(), "hello\n");
}

#[test]
fn start_container_hooks_run_in_the_container_before_the_program() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("cat /tmp/hook; echo program")
        .with(|c| c["annotations"] = json!({ "a": "b" }));
    // A path of the container: the host has no /bin/in-the-container.
    std::os::unix::fs::symlink("busybox", bundle.rootfs().join("bin/in-the-container")).unwrap();
    let hook = json!({
        "path": "/bin/sh", "env": ["PATH=/bin", "ONLY=this"],
        "args": ["sh", "-c", "cat >/tmp/state; echo hook pid=$$ $ONLY $TERM >/tmp/hook"],
    });
    let bundle = with_hook(bundle, "startContainer", hook);
    let container = world.create(&bundle, "c");
    assert!(
        !bundle.rootfs().join("tmp/hook").exists(),
        "it ran before start"
    );
    container.start();
    assert_eq!(container.exit_code(), 0);
    let text = container.stdout();
    assert!(
        text.starts_with("hook pid=") && text.contains(" this"),
        "{text}"
    );
    assert!(text.ends_with("program\n"), "{text}");
    let state = fs::read_to_string(bundle.rootfs().join("tmp/state")).unwrap();
    let state = serde_json_from(&state);
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], json!(container.id));
    assert_eq!(state["bundle"], json!(bundle.dir()));
    assert_eq!(state["annotations"], json!({ "a": "b" }));
}

#[test]
fn a_hook_that_fails_before_the_start_fails_create_and_undoes_it() {
    let world = World::new();
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let log = world.path(kind);
        let failing = "cat >/dev/null; echo to stdout; echo to stderr >&2; exit 3";
        let bundle = with_hook(
            world.bundle().sh("exit 0"),
            kind,
            json!({ "path": "/bin/true" }),
        );
        let bundle = with_hook(bundle, kind, sh(failing));
        let never = world.path("never");
        let bundle = with_hook(bundle, kind, sh(&format!("touch {}", never.display())));
        let bundle = with_hook(bundle, "poststop", sh(&format!("cat >{}", log.display())));
        let out = world.try_create(&bundle, kind);
        let _ = out.fails_with(
            1,
            "unable to start container process: error during container init: error running hook #1: \
             error running hook: exit status 3, stdout: to stdout",
        );
        assert!(!never.exists(), "{kind}");
        let state = serde_json_from(&fs::read_to_string(&log).unwrap());
        assert_eq!(state["status"], "stopped", "{kind}");
        world.assert_clean();
    }
}

#[test]
fn a_start_container_hook_that_fails_ends_the_container_without_its_program() {
    let world = World::new();
    let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", "echo why >&2; exit 7"] });
    let bundle = with_hook(world.bundle().sh("echo ran"), "startContainer", hook);
    let out = world.run(&bundle, "c").exits_with(1);
    assert_eq!(out.stdout(), "");
    assert!(
        out.stderr().contains(
            "error running hook #0: error running hook: exit status 7, stdout: , stderr: why"
        ),
        "{}",
        out.stderr()
    );
    world.assert_clean();
}

#[test]
fn a_hook_that_takes_too_long_is_killed() {
    let world = World::new();
    for (kind, script) in [
        ("createRuntime", "exec sleep 1000.25"),
        ("createContainer", "exec sleep 1000.25"),
    ] {
        let mut hook = sh(script);
        hook["timeout"] = json!(1);
        let bundle = with_hook(world.bundle().sh("exit 0"), kind, hook);
        let started = Instant::now();
        let _ = world.try_create(&bundle, kind).fails_with(
            1,
            "error running hook #0: hook ran past specified timeout of 1.0s",
        );
        assert!(started.elapsed() < Duration::from_secs(30), "{kind}");
        world.assert_clean();
    }
}

#[test]
fn a_program_that_is_missing_fails_the_hook() {
    let world = World::new();
    let hook = json!({ "path": "/no/such/hook" });
    let bundle = with_hook(world.bundle().sh("exit 0"), "createRuntime", hook);
    let _ = world.try_create(&bundle, "c").fails_with(
        1,
        "error running hook #0: fork/exec /no/such/hook: no such file or directory",
    );
    world.assert_clean();
}

#[test]
fn a_failing_poststart_hook_stops_the_container() {
    let world = World::new();
    let hook = sh("cat >/dev/null; exit 4");
    let bundle = with_hook(world.bundle().sh("sleep 1000"), "poststart", hook);
    let words = "error running hook #0: error running hook: exit status 4";
    if !world.runtime.is_ours {
        // runc 1.1 runs the hook in create.
        let _ = world.try_create(&bundle, "c").fails_with(1, words);
        return;
    }
    let container = world.create(&bundle, "c");
    let _ = container.command(&["start"]).fails_with(1, words);
    container.wait_for_status("stopped");
    assert_eq!(container.exit_code(), 137);
    let _ = container.delete().ok();
    let out = world.run(&bundle, "run").fails_with(1, words);
    assert_eq!(out.stdout(), "");
    world.assert_clean();
}

/// runc deletes the container too, but reports the failure (the specification wants a
/// warning).
#[test]
fn a_failing_poststop_hook_does_not_keep_the_container() {
    let world = World::new();
    let mark = world.path("mark");
    let bundle = with_hook(world.bundle().sh("exit 0"), "poststop", sh("exit 5"));
    let second = sh(&format!("touch {}", mark.display()));
    let bundle = with_hook(bundle, "poststop", second);
    let container = world.start(&bundle, "c");
    assert_eq!(container.exit_code(), 0);
    container.wait_for_status("stopped");
    let out = container.delete();
    assert!(
        out.stderr().contains("error running hook #0"),
        "{}",
        out.stderr()
    );
    if world.runtime.is_ours {
        let _ = out.ok();
        assert!(mark.exists(), "the hooks behind it run all the same");
    }
    let _ = container
        .command(&["state"])
        .fails_with(1, "container does not exist");
    world.assert_clean();
}

#[test]
fn poststop_hooks_run_for_what_delete_force_finds() {
    let world = World::new();
    let log = world.path("log");
    let hook = sh(&format!("cat >{}", log.display()));
    let bundle = with_hook(world.bundle().sh("sleep 1000"), "poststop", hook);
    let container = world.create(&bundle, "c");
    let _ = container.delete_force().ok();
    let state = serde_json_from(&fs::read_to_string(&log).unwrap());
    assert_eq!(state["status"], "stopped");
    world.assert_clean();
}

/// A hook has nothing of its caller but what it is given.
#[test]
fn hooks_inherit_no_descriptor_and_no_blocked_signal() {
    let world = World::new();
    let log = world.path("log");
    let script = format!(
        "cat >/dev/null; ls -l /proc/self/fd >{0}; grep SigBlk /proc/self/status >>{0}",
        log.display()
    );
    let bundle = with_hook(world.bundle().sh("exit 0"), "createRuntime", sh(&script));
    let _ = world.run(&bundle, "c").ok();
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("SigBlk:\t0000000000000000"), "{text}");
    let sockets = text.lines().filter(|l| l.contains("socket:")).count();
    assert_eq!(sockets, 0, "{text}");
}

/// SIGTERM to a `create` that waits for a hook ends both.
#[test]
fn an_interrupted_create_ends_its_hook() {
    let world = World::new();
    if !world.runtime.is_ours {
        // runc leaves the hook and the container behind.
        return;
    }
    for kind in ["createRuntime", "createContainer"] {
        let begun = world.path(kind);
        let script = format!("touch {}; exec sleep 1000.5", begun.display());
        let bundle = with_hook(world.bundle().sh("exit 0"), kind, sh(&script));
        let call = world.create_call(bundle.path(), kind).spawn();
        kuasar_runv_test_harness::wait_until("hook", Duration::from_secs(30), || begun.exists());
        process::signal(call.pid, libc::SIGTERM).unwrap();
        assert_ne!(call.wait().code(), 0);
        world.assert_clean();
    }
}

#[test]
fn a_state_of_many_annotations_reaches_a_hook_that_does_not_read_it() {
    let world = World::new();
    let size = world.path("size");
    let script = format!("wc -c >{}", size.display());
    let bundle = world.bundle().sh("exit 0").with(|c| {
        for n in 0..200 {
            c["annotations"][format!("krt.{n}")] = json!("x".repeat(1000));
        }
    });
    let bundle = with_hook(bundle, "prestart", json!({ "path": "/bin/true" }));
    let bundle = with_hook(bundle, "prestart", sh(&script));
    let _ = world.run(&bundle, "c").ok();
    let size: u64 = fs::read_to_string(&size).unwrap().trim().parse().unwrap();
    assert!(size > 200_000, "{size}");
}
