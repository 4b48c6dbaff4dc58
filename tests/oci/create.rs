//! `create`: everything is set up, the program has not run, and the caller gets its
//! descriptors back.

use std::fs;
use std::io::{PipeReader, Read, pipe};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::thread;
use std::time::Duration;

use kuasar_runv_test_harness::{World, json, process};

#[test]
fn create_sets_up_a_container_whose_program_has_not_run() {
    let world = World::new();
    let bundle = world.bundle().sh("echo ran; touch /ran");
    let container = world.create(&bundle, "c");
    assert_eq!(container.status(), "created");
    assert!(process::is_alive(container.pid));
    assert!(!bundle.rootfs().join("ran").exists());
    container.start();
    assert_eq!(container.exit_code(), 0);
    assert_eq!(container.stdout(), "ran\n");
    assert!(bundle.rootfs().join("ran").exists());
}

#[test]
fn the_pid_file_has_the_decimal_pid_and_no_newline() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("exit 0"), "c");
    let text = fs::read_to_string(world.pid_file("c")).unwrap();
    assert_eq!(text, container.state()["pid"].to_string());
}

#[test]
fn a_second_create_with_the_same_id_fails_and_leaves_the_first_alone() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 7");
    let first = world.create(&bundle, "c");
    let second = world.call(["create", "--bundle"]).arg(bundle.path());
    let _ = second
        .arg(&first.id)
        .output()
        .fails_with(1, "container with given ID already exists");
    assert_eq!(first.status(), "created");
    first.start();
    assert_eq!(first.exit_code(), 7);
}

#[test]
fn a_created_container_can_be_deleted_without_having_been_started() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("exit 0"), "c");
    let _ = container.delete().ok();
    // Its process was killed: it must not look like a success.
    assert_ne!(container.exit_code(), 0);
    let _ = container
        .command(&["state"])
        .fails_with(1, "container does not exist");
    world.assert_clean();
}

#[test]
fn the_bundle_defaults_to_the_current_directory() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 5");
    let call = world
        .call(["create", "--pid-file", "../c.pid"])
        .arg(world.id("c"))
        .current_dir(bundle.path());
    let call = call.output_to(world.output_file("c.stdout"), world.output_file("c.stderr"));
    let _ = call.output().ok();
    let container = kuasar_runv_test_harness::Container::adopt(&world, "c");
    container.start();
    assert_eq!(container.exit_code(), 5);
}

#[test]
fn a_program_that_is_missing_from_the_path_fails_create() {
    let world = World::new();
    let bundle = world.bundle().args(["no-such-program"]);
    let _ = world.try_create(&bundle, "c").fails_with(
        1,
        "exec: \"no-such-program\": executable file not found in $PATH",
    );
    world.assert_clean();
}

#[test]
fn a_missing_absolute_program_fails_create() {
    let world = World::new();
    let bundle = world.bundle().args(["/no/such/program"]);
    let out = world.try_create(&bundle, "c");
    let _ = out.fails_with(
        1,
        "exec: \"/no/such/program\": stat /no/such/program: no such file or directory",
    );
    world.assert_clean();
}

#[test]
fn a_program_that_is_not_executable_fails_create() {
    let world = World::new();
    let bundle = world.bundle().args(["/etc/passwd"]);
    let _ = world
        .try_create(&bundle, "c")
        .fails_with(1, "exec: \"/etc/passwd\": permission denied");
    world.assert_clean();
}

#[test]
fn a_relative_program_is_not_found_when_the_environment_has_no_path() {
    let world = World::new();
    let bundle = world
        .bundle()
        .args(["true"])
        .with(|c| c["process"]["env"] = json!([]));
    let out = world.try_create(&bundle, "c");
    let _ = out.fails_with(1, "exec: \"true\": executable file not found in $PATH");
    world.assert_clean();
}

/// Pipe whose writing end `create` inherits under this number.
fn inherited_pipe(call: &mut std::process::Command, fd: RawFd) -> PipeReader {
    let (reader, writer) = pipe().unwrap();
    // SAFETY: dup2 is async-signal-safe; `writer` is moved into the closure and
    // therefore open when it runs.
    unsafe {
        call.pre_exec(move || {
            if libc::dup2(writer.as_raw_fd(), fd) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    reader
}

/// containerd hands its listening socket as fd 3; shells leak 10 and 251.
#[test]
fn create_leaves_no_inherited_descriptor_open() {
    let world = World::new();
    let bundle = world.bundle().sh("sleep 1000");
    let mut call = world.create_call(bundle.path(), "c");
    let pipes = [3, 10, 251].map(|fd| (fd, inherited_pipe(call.command(), fd)));
    let call = call.output_to(world.output_file("c.stdout"), world.output_file("c.stderr"));
    let _ = call.output().ok();
    let container = kuasar_runv_test_harness::Container::adopt(&world, "c");
    container.start();
    for (fd, mut reader) in pipes {
        let end = thread::spawn(move || reader.read(&mut [0; 1]));
        kuasar_runv_test_harness::wait_until(
            &format!("end of the pipe that was fd {fd}"),
            Duration::from_secs(5),
            || end.is_finished(),
        );
        assert_eq!(end.join().unwrap().unwrap(), 0);
    }
    assert_eq!(container.status(), "running");
}

/// podman calls `kill` and `delete` without PATH.
#[test]
fn every_command_works_without_an_environment() {
    let world = World::new();
    let bundle = world.bundle().sh("sleep 1000");
    let bare =
        |call: kuasar_runv_test_harness::Invocation| call.env_remove("PATH").env_remove("HOME");
    let call = bare(world.create_call(bundle.path(), "c"));
    let call = call.output_to(world.output_file("c.stdout"), world.output_file("c.stderr"));
    let _ = call.output().ok();
    let container = kuasar_runv_test_harness::Container::adopt(&world, "c");
    for words in [&["start"][..], &["state"], &["kill", "--all"]] {
        let _ = bare(world.call(words)).arg(&container.id).output().ok();
    }
    let _ = bare(world.call(["kill", &container.id, "KILL"]))
        .output()
        .ok();
    assert_eq!(container.exit_code(), 137);
    container.wait_for_status("stopped");
    let _ = bare(world.call(["list"])).output().ok();
    let _ = bare(world.call(["delete"]))
        .arg(&container.id)
        .output()
        .ok();
    world.assert_clean();
}

#[test]
fn no_pivot_and_no_new_keyring_are_accepted() {
    let world = World::new();
    let bundle = world.bundle().sh("echo out");
    let out = world
        .call(["run", "--no-pivot", "--no-new-keyring", "-b"])
        .arg(bundle.path())
        .arg(world.id("c"))
        .output()
        .ok();
    assert_eq!(out.stdout(), "out\n");
}

#[test]
fn a_pid_file_that_cannot_be_written_fails_create() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0");
    let call = world.call(["create", "--pid-file"]);
    let call = call.arg(world.path("missing/pid")).arg("--bundle");
    let call = call.arg(bundle.path()).arg(world.id("c"));
    let out = call.output().fails_with(1, "no such file or directory");
    // runc names the temporary file.
    let words = format!("open {}/", world.path("missing").display());
    assert!(out.stderr().contains(&words), "{}", out.stderr());
    world.assert_clean();
}
