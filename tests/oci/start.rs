//! `start`.

use kuasar_runv_test_harness::World;

#[test]
fn start_returns_while_the_program_runs() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("echo up; sleep 1000"), "c");
    // The call also has to close its output, or this would not return.
    container.start();
    container.wait_for_output("up");
    assert_eq!(container.status(), "running");
}

#[test]
fn an_unknown_container_cannot_be_started() {
    let world = World::new();
    let call = world.call(["start"]).arg(world.id("unknown"));
    let _ = call.output().fails_with(1, "container does not exist");
}

#[test]
fn a_container_can_be_started_only_once() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("read line"), "c");
    let _ = container
        .command(&["start"])
        .fails_with(1, "cannot start an already running container");
    // stdin is /dev/null, so it has ended or is about to.
    assert_eq!(container.exit_code(), 1);
    container.wait_for_status("stopped");
    let _ = container
        .command(&["start"])
        .fails_with(1, "cannot start a container that has stopped");
}
