//! `run`, in the foreground and detached.

use std::fs;

use kuasar_runv_test_harness::{Container, SHORT, World, json, process, wait_until};

#[test]
fn run_prints_what_the_program_prints_and_leaves_nothing() {
    let world = World::new();
    let out = world.run_script("echo to stdout; echo to stderr >&2").ok();
    assert_eq!(out.stdout(), "to stdout\n");
    assert_eq!(out.stderr(), "to stderr\n");
    let list = world.call(["list", "-q"]).output().ok();
    assert_eq!(list.stdout(), "");
    world.assert_clean();
}

#[test]
fn run_returns_the_exit_code_of_the_program() {
    let world = World::new();
    for code in [0, 1, 42, 255] {
        let _ = world.run_script(&format!("exit {code}")).exits_with(code);
    }
}

#[test]
fn run_returns_128_and_the_signal_that_killed_the_program() {
    let world = World::new();
    // A program that reports its child's death, as most shells do.
    let _ = world
        .run_script("sh -c 'kill -TERM $$'; exit $?")
        .exits_with(143);
    // One that is itself killed: PID 1 is, but only from outside.
    let bundle = world.bundle().sh("echo ready; sleep 1000");
    let mut running = world.run_call(&bundle, "killed").stdout_pipe().spawn();
    let mut first = [0; 6];
    std::io::Read::read_exact(running.stdout.as_mut().unwrap(), &mut first).unwrap();
    let _ = world
        .call(["kill", &world.id("killed"), "KILL"])
        .output()
        .ok();
    let _ = running.wait().exits_with(137);
}

#[test]
fn run_detached_returns_while_the_program_runs() {
    let world = World::new();
    let bundle = world.bundle().sh("echo up; sleep 1000");
    let call = world
        .call(["run", "-d", "--pid-file"])
        .arg(world.pid_file("c"));
    let call = call.arg("--bundle").arg(bundle.path()).arg(world.id("c"));
    let call = call.output_to(world.output_file("c.stdout"), world.output_file("c.stderr"));
    let _ = call.output().ok();
    let container = Container::adopt(&world, "c");
    container.wait_for_output("up");
    assert_eq!(container.status(), "running");
    let _ = container.kill("KILL").ok();
    assert_eq!(container.exit_code(), 137);
    container.wait_for_status("stopped");
    let _ = container.delete().ok();
    world.assert_clean();
}

#[test]
fn run_writes_the_pid_file_before_the_program_ends() {
    let world = World::new();
    let bundle = world.bundle().sh("echo ready; cat");
    let call = world.call(["run", "--pid-file"]).arg(world.pid_file("c"));
    let call = call.arg("-b").arg(bundle.path()).arg(world.id("c"));
    let mut running = call.stdin_pipe().stdout_pipe().spawn();
    let mut first = [0; 6];
    std::io::Read::read_exact(running.stdout.as_mut().unwrap(), &mut first).unwrap();
    // The program does not wait for the file.
    wait_until("pid file", SHORT, || world.pid_file("c").exists());
    let pid: i32 = fs::read_to_string(world.pid_file("c"))
        .unwrap()
        .parse()
        .unwrap();
    assert!(process::is_alive(pid));
    let _ = running.wait().ok();
}

#[test]
fn a_program_that_cannot_be_executed_fails_run_and_leaves_nothing() {
    let world = World::new();
    let bundle = world.bundle().args(["no-such-program"]);
    let _ = world
        .run(&bundle, "c")
        .fails_with(1, "executable file not found in $PATH");
    world.assert_clean();
}

#[test]
fn the_script_interpreter_and_the_arguments_are_honoured() {
    let world = World::new();
    let bundle = world
        .bundle()
        .args(["/bin/args", "one", "two words", "", "ünïcode"]);
    fs::write(
        bundle.rootfs().join("bin/args"),
        "#!/bin/sh\nfor a in \"$@\"; do echo \"<$a>\"; done\n",
    )
    .unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(bundle.rootfs().join("bin/args"), mode).unwrap();
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.stdout(), "<one>\n<two words>\n<>\n<ünïcode>\n");
}

#[test]
fn the_rootfs_may_be_an_absolute_path_outside_the_bundle() {
    let world = World::new();
    let rootfs = world.path("elsewhere");
    let bundle = world.bundle().sh("cat /etc/hello");
    fs::rename(bundle.rootfs(), &rootfs).unwrap();
    fs::write(rootfs.join("etc/hello"), "hello\n").unwrap();
    let bundle = bundle.with(|c| c["root"]["path"] = json!(rootfs));
    assert_eq!(world.run(&bundle, "c").ok().stdout(), "hello\n");
}
