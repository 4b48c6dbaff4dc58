//! `pause` and `resume`.

use std::thread::sleep;
use std::time::Duration;

use kuasar_runv_test_harness::{Container, SHORT, World, wait_until};

/// Says that it runs, again and again, and answers SIGTERM.
const TICKS: &str = "trap 'echo got TERM' TERM
    echo ready
    while :; do echo tick; sleep 0.02; done";

/// How long something that must not happen is waited for.
const A_WHILE: Duration = Duration::from_millis(500);

fn ticks(container: &Container<'_>) -> usize {
    container.stdout().matches("tick").count()
}

#[test]
fn a_paused_container_stands_still_until_it_is_resumed() {
    let world = World::new();
    let container = world.start(&world.bundle().sh(TICKS), "c");
    container.wait_for_output("ready");
    let _ = container
        .command(&["resume"])
        .fails_with(1, "container not paused");

    let _ = container.command(&["pause"]).ok();
    let state = container.state();
    assert_eq!(state["status"], "paused");
    assert_eq!(state["pid"], container.pid);
    let table = world.call(["list"]).output().ok().stdout();
    assert!(table.contains("paused"), "{table}");
    // What was on its way arrives.
    sleep(A_WHILE);
    let before = ticks(&container);
    sleep(A_WHILE);
    assert_eq!(ticks(&container), before);

    let _ = container
        .command(&["pause"])
        .fails_with(1, "container not running");
    let _ = container
        .command(&["start"])
        .fails_with(1, "cannot start a container in the paused state");
    // Other signals than SIGKILL wait.
    let _ = container.kill("TERM").ok();
    sleep(A_WHILE);
    assert!(!container.stdout().contains("got TERM"));
    let words = format!(
        "cannot delete container {} that is not stopped: paused",
        container.id
    );
    let _ = container.delete().fails_with(1, &words);

    let _ = container.command(&["resume"]).ok();
    assert_eq!(container.status(), "running");
    container.wait_for_output("got TERM");
    let before = ticks(&container);
    wait_until("ticks", SHORT, || ticks(&container) > before);
}

#[test]
fn a_paused_container_can_be_killed() {
    let world = World::new();
    let container = world.start(&world.bundle().sh(TICKS), "c");
    container.wait_for_output("ready");
    let _ = container.command(&["pause"]).ok();
    let _ = container.kill("KILL").ok();
    assert_eq!(container.exit_code(), 137);
    container.wait_for_status("stopped");
    let _ = container
        .command(&["pause"])
        .fails_with(1, "container not running");
    let _ = container
        .command(&["resume"])
        .fails_with(1, "container not paused");
    let _ = container.delete().ok();
    world.assert_clean();
}

#[test]
fn a_paused_container_can_be_deleted_by_force() {
    let world = World::new();
    // Several processes, of which only one is PID 1 of the container.
    let container = world.start(&world.bundle().sh("sleep 1000 & echo ready; wait"), "c");
    container.wait_for_output("ready");
    let _ = container.command(&["pause"]).ok();
    let _ = container.delete_force().ok();
    assert_eq!(container.exit_code(), 137);
    world.assert_clean();
}

#[test]
fn a_created_container_can_be_paused_and_is_created_afterwards() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("exit 7"), "c");
    let _ = container.command(&["pause"]).ok();
    assert_eq!(container.status(), "paused");
    let _ = container
        .command(&["start"])
        .fails_with(1, "cannot start a container in the paused state");
    let _ = container.command(&["resume"]).ok();
    assert_eq!(container.status(), "created");
    container.start();
    assert_eq!(container.exit_code(), 7);
}

#[test]
fn an_unknown_container_is_neither_paused_nor_resumed() {
    let world = World::new();
    let id = world.id("unknown");
    for command in ["pause", "resume"] {
        let out = world.call([command, &id]).output();
        let _ = out.fails_with(1, "container does not exist");
        let _ = world.call([command]).output().fails_with(1, "");
    }
}
