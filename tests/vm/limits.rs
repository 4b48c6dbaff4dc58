//! Pausing and limits, where the virtual machine shows.

use kuasar_runv_test_harness::{SHORT, World, wait_until};

use crate::victims::{self, Victim};

/// What the machine cannot become cannot be promised.
#[test]
fn limits_beyond_the_virtual_machine_are_refused() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("exit 0"), "c");
    let update = |args: &[&str]| container.command(&[&["update"], args].concat());
    let out = update(&["--memory", "4000g"]).fails_with(1, "MiB");
    assert!(out.stderr().contains("max_memory_mib"), "{}", out.stderr());
    // An emulated machine does not grow unless it is told how far.
    let out = update(&["--cpuset-cpus", "0-99"]).fails_with(1, "CPU 99 does not exist");
    assert!(out.stderr().contains("max_vcpus"), "{}", out.stderr());
    let _ = update(&["--cpu-rt-runtime", "1000"]).fails_with(1, "realtime");
    let _ = update(&["--memory", "512m", "--cpuset-cpus", "0"]).ok();
    // The guest's own words for what only its kernel can know.
    let call = world.call(["update", "-r", "-", &container.id]);
    let json = r#"{"unified": {"memory.no-such-file": "1"}}"#;
    let out = call.stdin_bytes(json).output();
    let _ = out.fails_with(1, "memory.no-such-file");
    let call = world.call(["update", "-r", "-", &container.id]);
    let json = r#"{"memory": {"limit": 4096, "checkBeforeUpdate": true}}"#;
    let _ = call.stdin_bytes(json).output().fails_with(1, "4096");

    let _ = container
        .command(&["checkpoint", "--image-path", "/tmp"])
        .fails_with(1, "does not support checkpoints");
    assert_eq!(container.status(), "created");
}

#[test]
fn a_paused_container_that_dies_is_stopped() {
    for victim in Victim::ALL {
        let world = World::new();
        let container = world.start(&world.bundle().sh("echo up; sleep 1000"), "c");
        container.wait_for_output("up");
        let _ = container.command(&["pause"]).ok();
        victims::kill(&[victims::the(&world, victim)]);
        wait_until("status stopped", SHORT, || container.status() == "stopped");
        let _ = container
            .command(&["resume"])
            .fails_with(1, "container not paused");
        let _ = container.delete().ok();
        world.assert_clean();
    }
}

/// Who listens sees the end, also when it is that of everything.
#[test]
fn events_end_with_the_virtual_machine() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("echo up; sleep 1000"), "c");
    container.wait_for_output("up");
    let call = world.call(["events", "--interval", "1h", &container.id]);
    let events = call.spawn();
    // It listens once the sandboxer knows of it; there is nothing to see that by.
    std::thread::sleep(std::time::Duration::from_millis(500));
    victims::kill(&[victims::the(&world, Victim::Vm)]);
    let _ = events.wait().ok();
}
