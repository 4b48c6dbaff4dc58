//! How the process in the pid file takes signals, and how it ends.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;

use kuasar_runv_test_harness::{Bundle, World, process};

/// containerd's shim signals an exec'd process with kill(2), not with the runtime.
#[test]
fn signals_to_the_pid_of_the_pid_file_reach_the_program() {
    let world = World::new();
    let script = "for s in HUP INT QUIT USR1 USR2 TERM CONT WINCH; do trap \"echo got $s\" $s; done
        echo ready
        while :; do sleep 0.1; done";
    let container = world.start(&world.bundle().sh(script), "c");
    container.wait_for_output("ready");
    for (name, number) in [
        ("HUP", libc::SIGHUP),
        ("INT", libc::SIGINT),
        ("QUIT", libc::SIGQUIT),
        ("USR1", libc::SIGUSR1),
        ("USR2", libc::SIGUSR2),
        ("TERM", libc::SIGTERM),
        ("CONT", libc::SIGCONT),
        ("WINCH", libc::SIGWINCH),
    ] {
        process::signal(container.pid, number).unwrap();
        container.wait_for_output(&format!("got {name}\n"));
    }
    assert_eq!(container.status(), "running");
}

#[test]
fn the_pid_ends_with_the_code_of_the_program() {
    let world = World::new();
    for code in [0, 1, 42] {
        let name = format!("c{code}");
        let container = world.start(&world.bundle().sh(&format!("exit {code}")), &name);
        assert_eq!(container.wait().code(), Some(code));
    }
}

#[test]
fn the_pid_is_ended_by_the_signal_that_ended_the_program() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("echo ready; sleep 1000"), "kill");
    container.wait_for_output("ready");
    let _ = container.kill("KILL").ok();
    assert_eq!(container.wait().signal(), Some(libc::SIGKILL));

    // Without a pid namespace SIGTERM has its default effect on the program.
    let bundle = world.bundle().sh("echo ready; exec sleep 1000").with(|c| {
        let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|n| n["type"] != "pid");
    });
    let container = world.start(&bundle, "term");
    container.wait_for_output("ready");
    let _ = container.kill("TERM").ok();
    assert_eq!(container.wait().signal(), Some(libc::SIGTERM));
}

#[test]
fn pid_1_of_a_container_ignores_what_it_does_not_handle() {
    let world = World::new();
    let container = world.start(&world.bundle().args(["sleep", "1000"]), "c");
    let _ = container.kill("TERM").ok();
    let _ = container.kill("INT").ok();
    process::signal(container.pid, libc::SIGTERM).unwrap();
    assert_eq!(container.status(), "running");
    assert!(process::is_alive(container.pid));
    let _ = container.kill("KILL").ok();
    assert_eq!(container.exit_code(), 137);
}

#[test]
fn run_in_the_foreground_passes_signals_on() {
    let world = World::new();
    let bundle = world.bundle().sh(CATCHES_TERM);
    term_to_run_reaches_the_program(&world, &bundle);
}

/// Between the start of the program and the moment `run` begins to wait for it.
#[test]
fn a_signal_that_comes_early_is_the_programs() {
    let world = World::new();
    let bundle = world.bundle().sh(CATCHES_TERM).with(|c| {
        c["hooks"] = serde_json::json!({
            "poststart": [{"path": "/bin/sleep", "args": ["sleep", "2"]}],
        });
    });
    term_to_run_reaches_the_program(&world, &bundle);
}

const CATCHES_TERM: &str =
    "trap 'echo got TERM; exit 42' TERM; echo ready; while :; do sleep 0.1; done";

/// Of a bundle with [`CATCHES_TERM`].
fn term_to_run_reaches_the_program(world: &World, bundle: &Bundle) {
    let mut running = world.run_call(bundle, "c").stdout_pipe().spawn();
    let mut stdout = running.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 6]).unwrap();
    process::signal(running.pid, libc::SIGTERM).unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "got TERM\n");
    let _ = running.wait().exits_with(42);
}
