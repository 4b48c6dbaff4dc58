//! `kill`.

use kuasar_runv_test_harness::World;

/// Ignores what it is not told to answer, as PID 1 of a pid namespace does anyway.
const ANSWERS: &str = "trap 'echo got TERM; exit 15' TERM
    trap 'echo got USR1' USR1
    echo ready
    while :; do sleep 0.1; done";

#[test]
fn signals_reach_the_program_by_name_and_by_number() {
    let world = World::new();
    let container = world.start(&world.bundle().sh(ANSWERS), "c");
    container.wait_for_output("ready");
    for signal in ["USR1", "SIGUSR1", "sigusr1", "usr1", "10"] {
        let before = container.stdout().matches("USR1").count();
        let _ = container.kill(signal).ok();
        kuasar_runv_test_harness::wait_until(
            &format!("answer to {signal}"),
            kuasar_runv_test_harness::SHORT,
            || container.stdout().matches("USR1").count() > before,
        );
    }
    // Without a signal it is SIGTERM.
    let _ = container.command(&["kill"]).ok();
    assert_eq!(container.exit_code(), 15);
    assert!(container.stdout().ends_with("got TERM\n"));
}

#[test]
fn an_unknown_signal_is_refused() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("exit 0"), "c");
    let _ = container.kill("NOSUCH").fails_with(1, "unknown signal");
    assert_eq!(container.status(), "created");
    // A number is the kernel's to judge; 0 only asks.
    for number in ["65", "1000"] {
        let _ = container
            .kill(number)
            .fails_with(1, "unable to signal init: invalid argument");
    }
    let _ = container.kill("0").ok();
    assert_eq!(container.status(), "created");
}

#[test]
fn real_time_signals_have_numbers() {
    let world = World::new();
    let script = "trap 'echo got 40' 40; echo ready; while :; do sleep 0.1; done";
    let container = world.start(&world.bundle().sh(script), "c");
    container.wait_for_output("ready");
    let _ = container.kill("40").ok();
    container.wait_for_output("got 40");
}

#[test]
fn an_unknown_container_cannot_be_killed() {
    let world = World::new();
    let id = world.id("unknown");
    // That comes before whether there is such a signal.
    let _ = world
        .call(["kill", &id, "NOSUCH"])
        .output()
        .fails_with(1, "container does not exist");
    let _ = world
        .call(["kill", &id, "9"])
        .output()
        .fails_with(1, "container does not exist");
}

#[test]
fn a_created_container_can_be_killed() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("exit 0"), "c");
    let _ = container.kill("9").ok();
    assert_eq!(container.exit_code(), 137);
    container.wait_for_status("stopped");
    let _ = container.command(&["start"]).fails_with(1, "");
    let _ = container.delete().ok();
    world.assert_clean();
}

/// containerd's shim maps these words to "already finished"; CRI sends `--all` to
/// every container right after its init has died.
#[test]
fn a_stopped_container_is_not_running_but_kill_all_succeeds() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("exit 0"), "c");
    assert_eq!(container.exit_code(), 0);
    container.wait_for_status("stopped");
    let _ = container.kill("9").fails_with(1, "container not running");
    let _ = world
        .call(["kill", "--all", &container.id, "9"])
        .output()
        .ok();
}

/// podman's `--pid host`: without a pid namespace nobody else ends the rest.
#[test]
fn kill_all_reaches_every_process_of_the_container() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("sleep 1000 & sleep 1001 & echo started; wait")
        .with(|c| {
            let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|n| n["type"] != "pid");
        });
    let container = world.start(&bundle, "c");
    container.wait_for_output("started");
    let _ = world
        .call(["kill", "--all", &container.id, "9"])
        .output()
        .ok();
    assert_eq!(container.exit_code(), 137);
    container.wait_for_status("stopped");
    let _ = container.delete().ok();
    world.assert_clean();
}
