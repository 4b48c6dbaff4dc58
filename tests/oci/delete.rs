//! `delete`.

use kuasar_runv_test_harness::{World, process};

#[test]
fn a_running_container_is_not_deleted_without_force() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("sleep 1000"), "c");
    let words = format!(
        "cannot delete container {} that is not stopped: running",
        container.id
    );
    let _ = container.delete().fails_with(1, &words);
    assert_eq!(container.status(), "running");

    let _ = container.delete_force().ok();
    assert_eq!(container.exit_code(), 137);
    assert!(!process::is_alive(container.pid));
    let _ = container
        .command(&["state"])
        .fails_with(1, "container does not exist");
    world.assert_clean();
}

#[test]
fn a_created_container_is_deleted_without_force() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("exit 0"), "c");
    let _ = container.delete().ok();
    assert_eq!(container.exit_code(), 137);
    world.assert_clean();
}

#[test]
fn a_stopped_container_is_deleted_once() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("exit 3"), "c");
    assert_eq!(container.exit_code(), 3);
    container.wait_for_status("stopped");
    let _ = container.delete().ok();
    world.assert_clean();
    let _ = container.delete().fails_with(1, "container does not exist");
    // The shim always sends this after the ordinary delete.
    let _ = container.delete_force().ok();
}

#[test]
fn delete_force_of_an_unknown_container_succeeds() {
    let world = World::new();
    let id = world.id("unknown");
    let _ = world
        .call(["delete", &id])
        .output()
        .fails_with(1, "container does not exist");
    let _ = world.call(["delete", "--force", &id]).output().ok();
    let _ = world.call(["delete", "-f", &id]).output().ok();
}

#[test]
fn an_id_can_be_used_again_after_delete() {
    let world = World::new();
    for code in [4, 5] {
        let container = world.start(&world.bundle().sh(&format!("exit {code}")), "c");
        assert_eq!(container.exit_code(), code);
        let _ = container.delete_force().ok();
    }
}

/// podman deletes within milliseconds of the kill, while the VM may still be dying.
#[test]
fn delete_right_after_kill_leaves_nothing() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("sleep 1000"), "c");
    let _ = container.kill("KILL").ok();
    let _ = container.delete_force().ok();
    world.assert_clean();
}
