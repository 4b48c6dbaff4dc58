//! `exec` where there is a machine in between: a hundred at once, deaths on the way,
//! the guest's cgroups.

use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::Duration;

use kuasar_runv_test_harness::{
    Bundle, Container, SHORT, Value, World, json, process, reaper, wait_until,
};

use crate::victims::{self, Victim};

fn sleeping(world: &World) -> Container<'_> {
    world.start(&world.bundle().sh("sleep 1000"), "c")
}

#[test]
fn a_hundred_processes_run_at_once() {
    const PROCESSES: i32 = 100;
    let world = World::new();
    let container = sleeping(&world);
    thread::scope(|scope| {
        for n in 0..PROCESSES {
            let container = &container;
            scope.spawn(move || {
                let script = format!("read line; echo $line {n}; exit {n}");
                let call = container.exec_call::<&str, _>([], ["/bin/sh", "-c", &script]);
                let out = call.stdin_bytes("process\n").output().exits_with(n);
                assert_eq!(out.stdout(), format!("process {n}\n"));
            });
        }
    });
    assert_eq!(container.status(), "running");
    let out = container.exec_sh(&[], "ls -d /proc/[0-9]* | wc -l").ok();
    assert!(
        out.stdout().trim().parse::<u32>().unwrap() < 8,
        "{}",
        out.stdout()
    );
}

#[test]
fn a_killed_command_leaves_no_process_that_was_not_complete() {
    let world = World::new();
    let container = sleeping(&world);
    // Somewhere between its first system call and its last.
    for delay_ms in 0..20 {
        let call = container.exec_call::<&str, _>([], ["/bin/sh", "-c", "sleep 100"]);
        let mut running = call.spawn();
        thread::sleep(Duration::from_millis(delay_ms));
        let _ = process::signal(running.pid, libc::SIGKILL);
        running.kill();
    }
    // What was complete stays, as with runc: on the host and in the guest alike.
    let agree = || {
        let out = container.command(&["ps", "--format", "json"]).ok();
        let stand_ins = out.stdout().split(',').count() - 1;
        let table = container
            .exec_sh(&[], "ps | grep -c '[s]leep 100$'")
            .stdout();
        let guest = table.trim().parse::<usize>().unwrap();
        // The shell executes its only command itself.
        stand_ins == guest + 1 || stand_ins == guest
    };
    wait_until("the same processes on both sides", SHORT, agree);
    let _ = container.delete_force().ok();
    world.assert_clean();
}

fn ends_with_the_machine(victim: Victim) {
    let world = World::new();
    let container = sleeping(&world);
    let detached = container.exec_detached("sleep 1000", "e");
    let script = "touch /tmp/up; sleep 1000";
    let foreground = container
        .exec_call::<&str, _>([], ["/bin/sh", "-c", script])
        .spawn();
    wait_until("the process in the foreground", SHORT, || {
        container.exec_sh(&[], "test -e /tmp/up").code() == 0
    });
    victims::kill(&[victims::the(&world, victim)]);
    assert_eq!(
        reaper::wait(detached, SHORT).unwrap().signal(),
        Some(libc::SIGKILL)
    );
    let _ = foreground.wait().exits_with(137);
    container.wait_for_status("stopped");
    let _ = container
        .exec_sh(&[], "exit 0")
        .fails_with(255, "cannot exec in a stopped container");
    let _ = container.delete().ok();
    world.assert_clean();
}

#[test]
fn death_of_the_sandboxer_ends_the_execs() {
    ends_with_the_machine(Victim::Sandboxer);
}

#[test]
fn death_of_the_vm_ends_the_execs() {
    ends_with_the_machine(Victim::Vm);
}

#[test]
fn death_of_the_sandboxer_fails_an_exec_on_its_way() {
    let world = World::new();
    let container = sleeping(&world);
    thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| {
                let out = container.exec_sh(&[], "sleep 1000");
                assert!(
                    [137, 255].contains(&out.code()),
                    "{} {}",
                    out.code(),
                    out.stderr()
                );
            });
        }
        victims::kill(&[victims::the(&world, Victim::Sandboxer)]);
    });
    let _ = container.delete_force().ok();
    world.assert_clean();
}

fn writable_cgroups(config: &mut Value) {
    for mount in config["mounts"].as_array_mut().unwrap() {
        if mount["destination"] == "/sys/fs/cgroup" {
            mount["options"] = json!(["nosuid", "noexec", "nodev", "rw"]);
        }
    }
}

/// The container can write to its own cgroup, whose root it sees.
fn with_own_cgroup(bundle: Bundle) -> Bundle {
    bundle.with(writable_cgroups).with(|c| {
        let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "cgroup" }));
    })
}

#[test]
fn a_process_runs_in_a_sub_cgroup() {
    let world = World::new();
    let bundle = with_own_cgroup(world.bundle().sh("sleep 1000"));
    let container = world.start(&bundle, "c");
    let _ = container.exec_sh(&[], "mkdir -p /sys/fs/cgroup/a/b").ok();
    let cgroup = |flags: &[&str]| {
        container
            .exec_sh(flags, "cat /proc/self/cgroup")
            .ok()
            .stdout()
    };
    assert_eq!(cgroup(&["--cgroup", "a/b"]), "0::/a/b\n");
    assert_eq!(cgroup(&[]), "0::/\n");
    let _ = container
        .exec_sh(&["--cgroup", "cpu:a"], "exit 0")
        .fails_with(255, "unknown controller cpu");
    // With controllers for its own cgroups it can have no process beside them; then
    // a new one goes where the first is.
    let script = "echo 1 >/sys/fs/cgroup/a/b/cgroup.procs && echo $$ >/sys/fs/cgroup/a/cgroup.procs
        echo +pids >/sys/fs/cgroup/cgroup.subtree_control";
    let _ = container.exec_sh(&[], script).ok();
    assert_eq!(cgroup(&[]), "0::/a/b\n");
}

/// runc's command waits for the thaw; here only the process does.
#[test]
fn a_paused_container_takes_a_process_that_runs_when_it_is_resumed() {
    let world = World::new();
    let container = sleeping(&world);
    let _ = container.command(&["pause"]).ok();
    let pid_file = world.pid_file("e");
    let flags = ["--ignore-paused", "--detach", "--pid-file"].map(std::ffi::OsStr::new);
    let flags = flags.into_iter().chain([pid_file.as_os_str()]);
    let call = container.exec_call(flags, ["/bin/sh", "-c", "exit 7"].map(std::ffi::OsStr::new));
    let files = (world.output_file("out"), world.output_file("err"));
    let _ = call.output_to(files.0, files.1).output().ok();
    // Others go on meanwhile: the frozen one keeps no helper.
    let _ = container
        .exec_call(["--ignore-paused"], ["nope"])
        .output()
        .fails_with(255, "executable file not found");
    let listed = container.command(&["ps", "--format", "json"]).ok().stdout();
    assert_eq!(listed.matches(',').count(), 1, "{listed}");
    let _ = container.command(&["resume"]).ok();
    let pid = std::fs::read_to_string(pid_file).unwrap().parse().unwrap();
    assert_eq!(reaper::wait(pid, SHORT).unwrap().code(), Some(7));
}

/// The shared directory does not fill up with what execs have had open.
#[test]
fn preserved_files_of_an_exec_leave_nothing_in_the_shared_directory() {
    let world = World::new();
    let container = sleeping(&world);
    std::fs::write(world.path("file"), "text\n").unwrap();
    for _ in 0..2 {
        let file = std::fs::File::open(world.path("file")).unwrap();
        let script = "cat <&3; ls -l /proc/self/fd/3";
        let call = container.exec_call(["--preserve-fds", "1"], ["/bin/sh", "-c", script]);
        let out = call.descriptors([file.into()]).output().ok().stdout();
        assert!(out.starts_with("text\n"), "{out}");
        assert!(out.contains("fd-3"), "{out}");
    }
    assert_eq!(shared(&world, &container), ["rootfs"]);
}

/// What is in the container's part of the pod's shared directory, seen in the
/// sandboxer's mount namespace.
fn shared(world: &World, container: &Container<'_>) -> Vec<String> {
    let sandbox = world.root.join("sandboxes").join(&container.id);
    let record = std::fs::read(sandbox.join("sandbox.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    let pid = &record["sandboxer"]["pid"];
    let share = sandbox.join("share").join(&container.id);
    let path = format!("/proc/{pid}/root{}", share.display());
    let entries = std::fs::read_dir(path).unwrap();
    let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name();
    entries
        .map(|e| name(e).to_string_lossy().into_owned())
        .collect()
}
