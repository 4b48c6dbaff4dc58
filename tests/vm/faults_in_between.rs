//! `kill -9` in the middle of a command: of the command itself at any moment, and
//! of the processes it has just started. Whatever is left, `delete --force` cleans.

use std::thread;
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::data::Prng;
use kuasar_runv_test_harness::process;
use kuasar_runv_test_harness::wait::holds_within;
use kuasar_runv_test_harness::{CALL, Running, World, reaper, wait_until};

use crate::victims::{self, Victim};

/// Statuses a container may have after its command was killed.
const TRUE_STATUSES: [&str; 5] = ["creating", "created", "running", "stopped", "unknown"];

/// How long `create` takes here and now.
fn time_of_create() -> Duration {
    let world = World::new();
    let started = Instant::now();
    let container = world.create(&world.bundle().sh("exit 0"), "c");
    let elapsed = started.elapsed();
    let _ = container.delete_force().ok();
    elapsed
}

fn spawn_create(world: &World) -> Running {
    let bundle = world.bundle().sh("sleep 1000");
    let call = world.create_call(bundle.path(), "c");
    let files = (world.output_file("c.stdout"), world.output_file("c.stderr"));
    call.output_to(files.0, files.1).spawn()
}

/// Whatever the command left: `state` and `list` answer, and `delete --force` cleans.
fn whatever_is_left_is_true_and_can_be_deleted(world: &World, context: &str) {
    let id = world.id("c");
    let list = world.call(["list", "--format", "json"]).output().ok();
    let state = world.call(["state", &id]).output();
    if state.code() == 0 {
        let state: serde_json::Value = serde_json::from_slice(&state.stdout).unwrap();
        let status = state["status"].as_str().unwrap().to_owned();
        assert!(
            TRUE_STATUSES.contains(&status.as_str()),
            "{context}: {status}"
        );
        let pid = i32::try_from(state["pid"].as_i64().unwrap()).unwrap();
        assert_eq!(
            pid > 0 && process::is_alive(pid),
            status == "created" || status == "running",
            "{context}: {status} with pid {pid}"
        );
        assert!(list.stdout().contains(&id), "{context}: not in the list");
    } else {
        let _ = state.fails_with(1, "container does not exist");
    }
    let _ = world.call(["delete", "--force", &id]).output().ok();
    let clean = holds_within(Duration::from_secs(20), || world.leaks().is_empty());
    assert!(
        clean,
        "{context}: left behind:\n{}",
        world.leaks().join("\n")
    );
    // And the id is free again: nothing of the dead container is in the way.
    let _ = world
        .call(["state", &id])
        .output()
        .fails_with(1, "container does not exist");
}

#[test]
fn create_killed_at_any_moment() {
    const ROUNDS: u32 = 12;
    let time = time_of_create();
    let mut prng = Prng::new(11);
    for round in 0..ROUNDS {
        let world = World::new();
        // One moment in each twelfth of the time, and a little beyond it.
        let part = time * 11 / 10 / ROUNDS;
        let jitter = prng.below(u64::try_from(part.as_micros()).unwrap().max(1));
        let moment = part * round + Duration::from_micros(jitter);
        let mut create = spawn_create(&world);
        thread::sleep(moment);
        create.kill();
        let _ = reaper::wait(create.pid, CALL).unwrap();
        whatever_is_left_is_true_and_can_be_deleted(&world, &format!("killed after {moment:?}"));
    }
}

/// Ctrl-C, a time-out of the caller: the command cleans up after itself.
#[test]
fn create_interrupted_at_any_moment_leaves_nothing() {
    const ROUNDS: u32 = 4;
    let time = time_of_create();
    for round in 0..ROUNDS {
        let world = World::new();
        let moment = time / ROUNDS * round + Duration::from_millis(20);
        let create = spawn_create(&world);
        thread::sleep(moment);
        // It may have ended just now.
        let _ = process::signal(create.pid, libc::SIGTERM);
        let out = create.wait();
        if out.code() == 0 {
            continue;
        }
        let clean = holds_within(Duration::from_secs(20), || world.leaks().is_empty());
        assert!(
            clean,
            "after {moment:?}: left behind:\n{}",
            world.leaks().join("\n")
        );
    }
}

#[test]
fn create_fails_cleanly_when_a_process_it_started_dies() {
    for victim in Victim::ALL {
        let world = World::new();
        let create = spawn_create(&world);
        wait_until(&format!("{victim:?}"), CALL, || {
            !victims::find(&world, victim).is_empty()
        });
        victims::kill(&victims::find(&world, victim));
        let out = create.wait();
        let said = std::fs::read_to_string(world.path("c.stderr")).unwrap();
        assert_eq!(out.code(), 1, "{victim:?}: {said}");
        assert!(!said.is_empty(), "{victim:?}: no word about it");
        let clean = holds_within(Duration::from_secs(20), || world.leaks().is_empty());
        assert!(
            clean,
            "{victim:?}: left behind:\n{}",
            world.leaks().join("\n")
        );
    }
}

#[test]
fn start_killed_at_any_moment() {
    for moment in [0, 3, 8, 15, 30] {
        let world = World::new();
        let container = world.create(&world.bundle().sh("sleep 1000"), "c");
        let mut start = world.call(["start", &container.id]).spawn();
        thread::sleep(Duration::from_millis(moment));
        start.kill();
        let _ = reaper::wait(start.pid, CALL).unwrap();
        let status = container.status();
        assert!(
            ["created", "running"].contains(&status.as_str()),
            "{status}"
        );
        whatever_is_left_is_true_and_can_be_deleted(&world, &format!("killed after {moment} ms"));
    }
}

#[test]
fn delete_killed_at_any_moment() {
    for moment in [0, 3, 10, 25, 60] {
        let world = World::new();
        let container = world.start(&world.bundle().sh("sleep 1000"), "c");
        let mut delete = world.call(["delete", "--force", &container.id]).spawn();
        thread::sleep(Duration::from_millis(moment));
        delete.kill();
        let _ = reaper::wait(delete.pid, CALL).unwrap();
        whatever_is_left_is_true_and_can_be_deleted(&world, &format!("killed after {moment} ms"));
    }
}

#[test]
fn run_in_the_foreground_killed() {
    let world = World::new();
    let bundle = world.bundle().sh("echo up; sleep 1000");
    let mut run = world.run_call(&bundle, "c").stdout_pipe().spawn();
    let mut first = [0; 3];
    std::io::Read::read_exact(run.stdout.as_mut().unwrap(), &mut first).unwrap();
    run.kill();
    let _ = reaper::wait(run.pid, CALL).unwrap();
    whatever_is_left_is_true_and_can_be_deleted(&world, "run killed");
}
