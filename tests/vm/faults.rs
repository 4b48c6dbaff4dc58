//! `kill -9` of every kind of process of a created and of a running container:
//! `state` and `list` tell the truth at once, `delete` cleans up completely.

use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::{Container, SHORT, Value, World, leaks, process, wait_until};

use crate::victims::{self, Victim};

/// How long the truth may take: the next process has to notice the death.
const AT_ONCE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Created,
    Running,
}

fn container_at<'w>(world: &'w World, stage: Stage) -> Container<'w> {
    let container = world.create(&world.bundle().sh("echo up; sleep 1000"), "c");
    if stage == Stage::Running {
        container.start();
        container.wait_for_output("up");
    }
    container
}

fn list_status(world: &World) -> Value {
    let out = world.call(["list", "--format", "json"]).output().ok();
    let list: Value = serde_json::from_slice(&out.stdout).unwrap();
    list[0]["status"].clone()
}

/// The container has died: everybody says so, and `delete` removes all of it.
fn is_stopped_and_can_be_deleted(world: &World, container: &Container<'_>, delete: &[&str]) {
    let killed = Instant::now();
    wait_until("status stopped", AT_ONCE, || {
        container.status() == "stopped"
    });
    assert_eq!(
        list_status(world),
        "stopped",
        "after {:?}",
        killed.elapsed()
    );
    assert_eq!(container.state()["pid"], 0);
    let _ = container
        .kill("KILL")
        .fails_with(1, "container not running");
    let _ = world
        .call(["kill", "--all", &container.id, "9"])
        .output()
        .ok();
    let _ = container.command(&["start"]).fails_with(1, "");
    let status = container.wait_within(SHORT);
    assert!(
        !status.success(),
        "a container that was killed did not succeed: {status}"
    );
    let _ = container.command(delete).ok();
    world.assert_clean();
    let _ = container.delete_force().ok();
}

fn survives_the_death_of(victim: Victim) {
    for stage in [Stage::Created, Stage::Running] {
        let world = World::new();
        let container = container_at(&world, stage);
        victims::kill(&[victims::the(&world, victim)]);
        // A container that is stopped needs no force.
        let delete: &[&str] = match stage {
            Stage::Created => &["delete", "--force"],
            Stage::Running => &["delete"],
        };
        is_stopped_and_can_be_deleted(&world, &container, delete);
    }
}

#[test]
fn death_of_the_vm() {
    survives_the_death_of(Victim::Vm);
}

#[test]
fn death_of_the_sandboxer() {
    survives_the_death_of(Victim::Sandboxer);
}

#[test]
fn death_of_the_stand_in() {
    survives_the_death_of(Victim::StandIn);
}

#[test]
fn death_of_everything_at_once() {
    let world = World::new();
    let container = container_at(&world, Stage::Running);
    let all: Vec<_> = Victim::ALL
        .iter()
        .flat_map(|v| victims::find(&world, *v))
        .collect();
    assert_eq!(all.len(), 3);
    victims::kill(&all);
    is_stopped_and_can_be_deleted(&world, &container, &["delete", "--force"]);
}

/// The file is replaced in one step, so only a broken disk does this.
#[test]
fn a_state_file_that_is_cut_off_keeps_nobody_from_deleting() {
    let world = World::new();
    let container = container_at(&world, Stage::Running);
    let state = world
        .root
        .join("containers")
        .join(&container.id)
        .join("state.json");
    std::fs::write(&state, "{ cut off").unwrap();
    let _ = world.call(["list"]).output().ok();
    let _ = container.delete_force().ok();
    let _ = container.wait_within(SHORT);
    wait_until("end of every process", SHORT, || {
        leaks::processes(world.name()).is_empty()
    });
    assert!(leaks::files(&world.root).is_empty());
    // Nobody knows any more which cgroups were the container's.
    for cgroup in leaks::cgroups(world.name()) {
        // It stays busy until the kernel has done with its last process.
        wait_until("removal of a cgroup", SHORT, || {
            std::fs::remove_dir(&cgroup).is_ok()
        });
    }
}

/// A process that hangs is as bad as one that is dead.
#[test]
fn delete_force_ends_what_hangs() {
    for victim in Victim::ALL {
        let world = World::new();
        let container = container_at(&world, Stage::Running);
        process::signal(victims::the(&world, victim), libc::SIGSTOP).unwrap();
        let asked = Instant::now();
        let _ = container.state();
        let _ = world.call(["list"]).output().ok();
        let _ = container.delete_force().ok();
        assert!(
            asked.elapsed() < Duration::from_secs(30),
            "{victim:?}: {:?}",
            asked.elapsed()
        );
        let _ = container.wait_within(SHORT);
        world.assert_clean();
    }
}

#[test]
fn a_guest_that_switches_itself_off_is_a_stopped_container() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("echo up; sleep 0.2; reboot -f; sleep 1000")
        .capabilities(&["CAP_SYS_BOOT"])
        .with(|c| {
            // In a pid namespace of its own reboot(2) ends only that namespace.
            let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|n| n["type"] != "pid");
        });
    let container = world.start(&bundle, "c");
    let status = container.wait_within(SHORT);
    assert!(!status.success(), "{status}");
    is_stopped_and_can_be_deleted(&world, &container, &["delete"]);
}

/// The file server cannot confine itself without this capability, and must not
/// serve unconfined. Nobody waits for the boot to time out then.
#[test]
fn a_device_that_fails_ends_the_pod_at_once_with_its_reason() {
    const CAP_SYS_CHROOT: libc::c_ulong = 18;
    let world = World::new();
    let bundle = world.bundle().sh("exit 0");
    let mut call = world.run_call(&bundle, "c");
    // SAFETY: prctl takes integers and is async-signal-safe.
    unsafe {
        call.command().pre_exec(|| {
            match libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_CHROOT, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let asked = Instant::now();
    let out = call.output();
    assert!(asked.elapsed() < SHORT, "{:?}", asked.elapsed());
    let _ = out.fails_with(
        1,
        "the virtio-fs device failed: cannot start the device: Operation not permitted",
    );
    world.assert_clean();
}

#[test]
fn run_in_the_foreground_ends_with_its_vm() {
    let world = World::new();
    let bundle = world.bundle().sh("echo up; sleep 1000");
    let mut running = world.run_call(&bundle, "c").stdout_pipe().spawn();
    let mut first = [0; 3];
    std::io::Read::read_exact(running.stdout.as_mut().unwrap(), &mut first).unwrap();
    victims::kill(&[victims::the(&world, Victim::Vm)]);
    let out = running.wait();
    assert_ne!(out.code(), 0);
    world.assert_clean();
}
