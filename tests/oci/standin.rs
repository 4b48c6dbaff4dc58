//! The process in the pid file, as engines use it: reaped by the subreaper, its
//! namespaces entered, its root directory read, its cgroup accounted.

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::thread;
use std::time::Duration;

use kuasar_runv_test_harness::{Container, SHORT, World, json, process, wait_until};

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap()
}

#[test]
fn the_pid_is_a_child_of_the_subreaper_and_outside_the_callers_session() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("sleep 1000"), "c");
    let created = process::Process::read(container.pid).unwrap();
    assert_eq!(created.parent, own_pid());
    container.start();
    let running = process::Process::read(container.pid).unwrap();
    assert_eq!(running.parent, own_pid());
    // SAFETY: getsid and getpgid take integers.
    let (session, group, own_session, own_group) = unsafe {
        let pid = container.pid;
        (
            libc::getsid(pid),
            libc::getpgid(pid),
            libc::getsid(0),
            libc::getpgid(0),
        )
    };
    assert_ne!(session, own_session);
    assert_ne!(group, own_group);
}

/// CNI, docker's hook, `podman top`, `podman cp` and later containers enter these.
#[test]
fn the_pid_is_in_namespaces_of_its_own() {
    let world = World::new();
    let first = world.start(&world.bundle().sh("sleep 1000"), "a");
    let second = world.start(&world.bundle().sh("sleep 1000"), "b");
    for kind in ["mnt", "net", "ipc", "uts"] {
        let [host, a, b] =
            [own_pid(), first.pid, second.pid].map(|pid| process::namespace(pid, kind).unwrap());
        assert_ne!(a, host, "{kind}");
        assert_ne!(b, host, "{kind}");
        assert_ne!(a, b, "{kind}");
    }
}

/// `podman cp` reads and writes below this directory.
#[test]
fn the_root_of_the_pid_is_the_containers_with_its_volumes() {
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("in-volume"), "volume\n").unwrap();
    fs::write(world.path("single"), "single\n").unwrap();
    let bundle = world
        .bundle()
        .sh("while [ ! -e /etc/copied ]; do sleep 0.05; done; cat /etc/copied /vol/copied; sleep 1000")
        .bind(&volume, "/vol")
        .bind(&world.path("single"), "/etc/single");
    fs::write(bundle.rootfs().join("etc/marker"), "marker\n").unwrap();
    let container = world.start(&bundle, "c");
    let root = process::root_of(container.pid);
    let read = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    assert_eq!(read("etc/marker"), "marker\n");
    assert_eq!(read("vol/in-volume"), "volume\n");
    assert_eq!(read("etc/single"), "single\n");
    assert!(
        !root.join(world.dir().strip_prefix("/").unwrap()).exists(),
        "the host's files show"
    );
    fs::write(root.join("vol/copied"), "into the volume\n").unwrap();
    fs::write(root.join("etc/copied"), "into the root\n").unwrap();
    container.wait_for_output("into the root\ninto the volume\n");
    assert!(volume.join("copied").exists());
}

#[test]
fn sigkill_of_the_pid_kills_the_program() {
    let world = World::new();
    let script = "while :; do date +%s%N >/tmp/beat; sleep 0.05; done";
    let bundle = world.bundle().sh(script);
    let container = world.start(&bundle, "c");
    let beat = || fs::read_to_string(bundle.rootfs().join("tmp/beat")).unwrap_or_default();
    wait_until("first beat", SHORT, || !beat().is_empty());
    process::signal(container.pid, libc::SIGKILL).unwrap();
    assert_eq!(container.wait().signal(), Some(libc::SIGKILL));
    container.wait_for_status("stopped");
    wait_until("end of the beat", SHORT, || {
        let before = beat();
        thread::sleep(Duration::from_millis(500));
        beat() == before
    });
    let _ = container.delete().ok();
    world.assert_clean();
}

/// Engines find the memory, cpu and oom files of a container by this.
#[test]
fn the_pid_is_in_the_cgroup_of_the_configuration() {
    let world = World::new();
    let path = format!("/{}", world.id("cgroup"));
    let bundle = world
        .bundle()
        .sh("sleep 1000")
        .with(|c| c["linux"]["cgroupsPath"] = json!(path));
    let container = world.create(&bundle, "c");
    for moment in ["created", "running"] {
        let table = fs::read_to_string(format!("/proc/{}/cgroup", container.pid)).unwrap();
        for line in table.lines() {
            assert!(line.ends_with(&path), "{moment}: {line}");
        }
        if moment == "created" {
            container.start();
        }
    }
    let _ = container.delete_force().ok();
    world.assert_clean();
}

/// conmon and the shim let the command die with them; the container stays.
#[test]
fn the_container_survives_the_death_of_its_creators_parent() {
    let world = World::new();
    let bundle = world.bundle().sh("echo up; sleep 1000");
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut call = world.create_call(bundle.path(), "c");
            // SAFETY: prctl is async-signal-safe and takes integers.
            unsafe {
                call.command().pre_exec(|| {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    Ok(())
                });
            }
            let files = (world.output_file("c.stdout"), world.output_file("c.stderr"));
            let _ = call.output_to(files.0, files.1).output().ok();
        });
        // The thread that forked ends here: that is what PDEATHSIG looks at.
    });
    let container = Container::adopt(&world, "c");
    container.start();
    container.wait_for_output("up");
    assert_eq!(container.status(), "running");
}

#[test]
fn the_pid_ends_only_after_the_container_is_stopped_for_everyone() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("sleep 0.2; exit 6"), "c");
    assert_eq!(container.exit_code(), 6);
    // Engines delete at once, without force, when they have reaped the pid.
    assert_eq!(container.status(), "stopped");
    let _ = container.delete().ok();
}
