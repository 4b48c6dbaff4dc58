//! `exec`: one more process in a container, its life and its end.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::thread;

use kuasar_runv_test_harness::{Container, SHORT, World, process, reaper, wait_until};

fn sleeping(world: &World) -> Container<'_> {
    world.start(&world.bundle().sh("sleep 1000"), "c")
}

#[test]
fn exec_ends_as_its_process_does() {
    let world = World::new();
    let container = sleeping(&world);
    for (script, code) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 300", 44),
        ("kill -KILL $$", 137),
        ("kill -TERM $$", 143),
    ] {
        let _ = container.exec_sh(&[], script).exits_with(code);
    }
    assert_eq!(container.status(), "running");
}

#[test]
fn what_cannot_be_started_is_255_with_the_reason() {
    let world = World::new();
    let bundle = world.bundle().sh("sleep 1000");
    fs::write(bundle.rootfs().join("bin/data"), "data").unwrap();
    let container = world.start(&bundle, "c");
    let start = "exec failed: unable to start container process: ";
    for (program, reason) in [
        ("nope", "exec: \"nope\": executable file not found in $PATH"),
        (
            "/bin/nope",
            "exec: \"/bin/nope\": stat /bin/nope: no such file or directory",
        ),
        ("/bin/data", "exec: \"/bin/data\": permission denied"),
        ("/bin", "exec: \"/bin\": permission denied"),
    ] {
        let call = container.exec_call::<&str, _>([], [program]);
        let _ = call.output().fails_with(255, &format!("{start}{reason}"));
    }
    let _ = container.exec_sh(&["--cwd", "/nope"], "exit 0").fails_with(
        255,
        "chdir to cwd (\"/nope\") set in config.json failed: no such file",
    );
    let _ = container
        .exec_sh(&["--cwd", "nope"], "exit 0")
        .fails_with(255, "exec failed: Cwd must be an absolute path");
    let _ = container
        .exec_call::<&str, &str>([], [])
        .output()
        .fails_with(255, "exec failed: process args cannot be empty");
    let _ = world
        .call(["exec", &world.id("nobody"), "true"])
        .output()
        .fails_with(255, "exec failed: container does not exist");
    let _ = world.call(["exec"]).output().exits_with(1);
}

/// The kernel refuses it when everything else is done.
#[test]
fn a_program_of_an_unknown_format_fails_on_its_own_stderr() {
    let world = World::new();
    let bundle = world.bundle().sh("sleep 1000");
    let program = bundle.rootfs().join("bin/junk");
    fs::write(&program, "junk").unwrap();
    fs::set_permissions(
        &program,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let container = world.start(&bundle, "c");
    let call = container.exec_call::<&str, _>([], ["junk"]);
    let _ = call
        .output()
        .fails_with(1, "exec /bin/junk: exec format error");
}

#[test]
fn the_streams_are_those_of_the_caller() {
    let world = World::new();
    let container = sleeping(&world);
    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let script = "cat; echo problem >&2; exit 3";
    let call = container.exec_call::<&str, _>([], ["/bin/sh", "-c", script]);
    let out = call.stdin_bytes(bytes.clone()).output().exits_with(3);
    assert!(out.stdout == bytes, "{} bytes came back", out.stdout.len());
    assert_eq!(out.stderr(), "problem\n");
    // Everything is out before the command returns.
    let out = container.exec_sh(&[], "head -c 2000000 /dev/zero").ok();
    assert_eq!(out.stdout.len(), 2_000_000);
}

#[test]
fn a_created_container_takes_processes_before_its_own() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("cat /tmp/prepared"), "c");
    let _ = container.exec_sh(&[], "echo by exec >/tmp/prepared").ok();
    assert_eq!(container.status(), "created");
    container.start();
    assert_eq!(container.exit_code(), 0);
    assert_eq!(container.stdout(), "by exec\n");
    container.wait_for_status("stopped");
    let _ = container
        .exec_sh(&[], "exit 0")
        .fails_with(255, "exec failed: cannot exec in a stopped container");
}

#[test]
fn a_detached_process_is_a_child_of_the_subreaper() {
    let world = World::new();
    let container = sleeping(&world);
    let pid = container.exec_detached("echo up; read line; exit 5", "first");
    let other = container.exec_detached(
        "while [ ! -e /tmp/go ]; do sleep 0.05; done; exit 6",
        "other",
    );
    assert_ne!(pid, other);
    // Its stdin is /dev/null.
    let status = reaper::wait(pid, SHORT).unwrap();
    assert_eq!(status.code(), Some(5));
    let parent = process::Process::read(other).unwrap().parent;
    assert_eq!(parent, i32::try_from(std::process::id()).unwrap());
    let _ = container.exec_sh(&[], "touch /tmp/go").ok();
    assert_eq!(reaper::wait(other, SHORT).unwrap().code(), Some(6));
    assert_eq!(
        fs::read_to_string(world.path("first.stdout")).unwrap(),
        "up\n"
    );
    assert_eq!(container.status(), "running");
}

/// What engines enter and account by the pid of an exec.
#[test]
fn the_pid_has_the_namespaces_and_cgroups_of_the_container() {
    let world = World::new();
    let bundle = world.bundle().sh("sleep 1000");
    fs::write(bundle.rootfs().join("etc/marker"), "marker\n").unwrap();
    let container = world.start(&bundle, "c");
    let pid = container.exec_detached("sleep 1000", "e");
    for kind in ["mnt", "net", "ipc", "uts"] {
        let [of_container, of_exec] = [container.pid, pid].map(|p| process::namespace(p, kind));
        assert_eq!(of_container, of_exec, "{kind}");
    }
    let cgroups = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert_eq!(cgroups(pid), cgroups(container.pid));
    let marker = process::root_of(pid).join("etc/marker");
    assert_eq!(fs::read_to_string(marker).unwrap(), "marker\n");
    process::signal(pid, libc::SIGKILL).unwrap();
    assert!(reaper::wait(pid, SHORT).is_some());
}

#[test]
fn signals_to_the_pid_reach_the_process() {
    let world = World::new();
    let container = sleeping(&world);
    let script = "trap 'echo got it; exit 4' TERM; echo ready; while :; do sleep 0.05; done";
    let pid = container.exec_detached(script, "e");
    let said = || fs::read_to_string(world.path("e.stdout")).unwrap();
    wait_until("ready", SHORT, || said().contains("ready"));
    process::signal(pid, libc::SIGTERM).unwrap();
    assert_eq!(reaper::wait(pid, SHORT).unwrap().code(), Some(4));
    assert_eq!(said(), "ready\ngot it\n");
}

#[test]
fn signals_to_the_command_reach_the_process() {
    let world = World::new();
    let container = sleeping(&world);
    let script = "trap 'exit 4' TERM; echo ready >/tmp/ready; while :; do sleep 0.05; done";
    let call = container.exec_call::<&str, _>([], ["/bin/sh", "-c", script]);
    let running = call.spawn();
    wait_until("ready", SHORT, || {
        container
            .exec_sh(&[], "cat /tmp/ready")
            .stdout()
            .contains("ready")
    });
    process::signal(running.pid, libc::SIGTERM).unwrap();
    let _ = running.wait().exits_with(4);
}

#[test]
fn sigkill_of_the_pid_kills_that_process_only() {
    let world = World::new();
    let bundle = world.bundle().sh("sleep 1000");
    let container = world.start(&bundle, "c");
    let script = "while :; do date +%s%N >/tmp/beat; sleep 0.05; done";
    let pid = container.exec_detached(script, "e");
    let beat = || fs::read_to_string(bundle.rootfs().join("tmp/beat")).unwrap_or_default();
    wait_until("first beat", SHORT, || !beat().is_empty());
    process::signal(pid, libc::SIGKILL).unwrap();
    assert_eq!(
        reaper::wait(pid, SHORT).unwrap().signal(),
        Some(libc::SIGKILL)
    );
    wait_until("end of the beat", SHORT, || {
        let before = beat();
        thread::sleep(std::time::Duration::from_millis(300));
        beat() == before
    });
    assert_eq!(container.status(), "running");
}

#[test]
fn the_end_of_the_container_is_the_end_of_its_processes() {
    let world = World::new();
    let container = sleeping(&world);
    let detached = container.exec_detached("sleep 1000", "e");
    let script = "touch /tmp/up; sleep 1000";
    let call = container.exec_call::<&str, _>([], ["/bin/sh", "-c", script]);
    let foreground = call.spawn();
    wait_until("the process in the foreground", SHORT, || {
        container.exec_sh(&[], "test -e /tmp/up").code() == 0
    });
    let _ = container.kill("KILL").ok();
    assert_eq!(
        reaper::wait(detached, SHORT).unwrap().signal(),
        Some(libc::SIGKILL)
    );
    let _ = foreground.wait().exits_with(137);
    container.wait_for_status("stopped");
    let _ = container.delete().ok();
    world.assert_clean();
}

#[test]
fn delete_by_force_takes_the_processes_along() {
    let world = World::new();
    let container = sleeping(&world);
    let pids = ["a", "b"].map(|name| container.exec_detached("sleep 1000", name));
    let _ = container.delete_force().ok();
    for pid in pids {
        let status = reaper::wait(pid, SHORT).unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL));
    }
    world.assert_clean();
}

#[test]
fn many_processes_run_at_once() {
    const PROCESSES: i32 = 20;
    let world = World::new();
    let container = sleeping(&world);
    thread::scope(|scope| {
        for n in 0..PROCESSES {
            let container = &container;
            scope.spawn(move || {
                let out = container.exec_sh(&[], &format!("echo process {n}; exit {n}"));
                let out = out.exits_with(n);
                assert_eq!(out.stdout(), format!("process {n}\n"));
            });
        }
    });
}

#[test]
fn the_pid_file_of_a_failed_exec_is_not_written() {
    let world = World::new();
    let container = sleeping(&world);
    let pid_file = world.pid_file("e");
    let flags = ["--pid-file", pid_file.to_str().unwrap()];
    let call = container.exec_call(flags, ["nope"]);
    let _ = call.output().fails_with(255, "executable file not found");
    assert!(!pid_file.exists());
}

#[test]
fn a_paused_container_takes_a_process_only_if_asked() {
    let world = World::new();
    let container = sleeping(&world);
    let _ = container.command(&["pause"]).ok();
    let _ = container
        .exec_sh(&[], "exit 0")
        .fails_with(255, "exec failed: cannot exec in a paused container");
    let call = container.exec_call(["--ignore-paused"], ["/bin/sh", "-c", "exit 7"]);
    let running = call.spawn();
    let _ = container.command(&["resume"]).ok();
    let _ = running.wait().exits_with(7);
}
