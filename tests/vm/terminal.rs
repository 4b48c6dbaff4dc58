//! What happens to the caller's terminal when something dies that runc does not
//! have, or that takes runc's terminal with it.

use std::fs::File;
use std::time::Duration;

use kuasar_runv_test_harness::screen::{is_cooked, spawn_on};
use kuasar_runv_test_harness::{Bundle, Running, SHORT, Screen, World, json, process, wait_until};

use crate::victims::{self, Victim};

fn at_a_terminal(world: &World, script: &str) -> (Bundle, Screen, File) {
    let bundle = world.bundle().sh(script);
    let bundle = bundle.with(|c| c["process"]["terminal"] = json!(true));
    let (screen, slave) = Screen::open(24, 80);
    (bundle, screen, slave)
}

fn run(world: &World, bundle: &Bundle, slave: &File) -> Running {
    spawn_on(slave, &[0, 1, 2], world.run_call(bundle, "c"))
}

#[test]
fn the_mode_is_restored_whatever_dies() {
    for victim in Victim::ALL {
        let world = World::new();
        let (bundle, mut screen, slave) = at_a_terminal(&world, "echo ready; sleep 1000");
        let running = run(&world, &bundle, &slave);
        screen.expect("ready");
        assert!(!is_cooked(&slave));
        victims::kill(&[victims::the(&world, victim)]);
        assert_ne!(running.wait().code(), 0, "{victim:?}");
        assert!(is_cooked(&slave), "{victim:?}");
    }
}

/// Nothing can be done by `run` itself then; the stand-in notices.
#[test]
fn the_mode_is_restored_and_the_program_told_when_run_is_killed() {
    let world = World::new();
    // The command that is killed before it has noted that the program was started has the
    // container go, as if it had never been there.
    let script =
        "trap 'echo told >/tmp/told; exit 5' HUP; sleep 2; echo ready; while :; do sleep 0.1; done";
    let (bundle, mut screen, slave) = at_a_terminal(&world, script);
    let told = bundle.rootfs().join("tmp/told");
    let running = run(&world, &bundle, &slave);
    screen.expect("ready");
    process::signal(running.pid, libc::SIGKILL).unwrap();
    wait_until("the old mode", SHORT, || is_cooked(&slave));
    wait_until("the program's end", SHORT, || told.exists());
    assert_eq!(running.wait().code(), 128 + libc::SIGKILL);
    let state = || world.call(["state", &world.id("c")]).output().ok().stdout();
    wait_until("status stopped", SHORT, || state().contains("\"stopped\""));
}

/// However far it has come.
#[test]
fn the_mode_is_restored_when_run_is_killed_early() {
    for wait in [0, 20, 40] {
        let world = World::new();
        let (bundle, mut screen, slave) = at_a_terminal(&world, "echo ready; sleep 1000");
        let running = run(&world, &bundle, &slave);
        screen.expect("ready");
        std::thread::sleep(Duration::from_millis(wait));
        process::signal(running.pid, libc::SIGKILL).unwrap();
        wait_until("the old mode", SHORT, || is_cooked(&slave));
        assert_eq!(running.wait().code(), 128 + libc::SIGKILL);
        let _ = world
            .call(["delete", "--force", &world.id("c")])
            .output()
            .ok();
    }
}

/// A shell's background job may not take the keyboard from the shell.
#[test]
fn a_background_job_waits_for_the_terminal() {
    let world = World::new();
    let (bundle, mut screen, slave) = at_a_terminal(&world, "echo in the container; exit 7");
    // As `run_call`, by a shell with jobs.
    let mut call = world.run_call(&bundle, "c");
    let command = call.command();
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    let envs: Vec<_> = command
        .get_envs()
        .filter_map(|(k, v)| Some((k.to_owned(), v?.to_owned())))
        .collect();
    let script = format!(
        "set -m; {} & sleep 1; jobs; fg; echo ended with $?",
        words.join(" ")
    );
    let shell = std::path::Path::new("/bin/bash");
    let mut shell = kuasar_runv_test_harness::Invocation::new(shell).args(["-c", &script]);
    for (key, value) in envs {
        shell = shell.env(key, value);
    }
    let running = spawn_on(&slave, &[0, 1, 2], shell);
    assert!(screen.shows_within("Stopped", Duration::from_secs(20)));
    screen.expect("in the container");
    screen.expect("ended with 7");
    assert_eq!(running.wait().code(), 0);
    assert!(is_cooked(&slave));
}
