//! Namespaces that containers share.

use kuasar_runv_test_harness::{Container, SHORT, World, wait_until};

const SHARED: [&str; 3] = ["network", "ipc", "uts"];

/// A container that waits until it is killed.
fn sandbox(world: &World) -> Container<'_> {
    let bundle = world
        .bundle()
        .sh("trap 'exit 0' TERM; hostname; echo up; while :; do sleep 0.1; done");
    let container = world.start(&bundle, "s");
    container.wait_for_output("up");
    container
}

/// Prints which namespaces the container has.
const OWN: &str = "for ns in net ipc uts pid mnt; do echo $ns=$(readlink /proc/self/ns/$ns); done";

#[test]
fn joined_namespaces_are_the_same_and_the_others_are_not() {
    let world = World::new();
    let first = sandbox(&world);
    let theirs = first.exec_sh(&[], OWN).ok();
    let script = format!("{OWN}; echo hostname=$(hostname); ls /proc | grep -c '^[0-9]'");
    for (name, kinds) in [
        ("m1", &SHARED[..]),
        ("m2", &["network", "ipc", "uts", "pid"]),
    ] {
        let bundle = world.bundle().sh(&script).joining(first.pid, kinds);
        let own = world.run(&bundle, name).ok();
        for (kind, ns) in [
            ("network", "net"),
            ("ipc", "ipc"),
            ("uts", "uts"),
            ("pid", "pid"),
        ] {
            let same = own.fact(ns) == theirs.fact(ns);
            assert_eq!(same, kinds.contains(&kind), "{name} {ns}");
        }
        assert_ne!(own.fact("mnt"), theirs.fact("mnt"));
        assert_eq!(own.fact("hostname"), "krt");
    }
    assert_eq!(first.status(), "running");
    // What is listened on in one is reached from the other.
    let server = "echo listening; echo hello | nc -l -p 7000";
    let server = world.bundle().sh(server).joining(first.pid, &SHARED);
    let server = world.start(&server, "server");
    server.wait_for_output("listening");
    let client =
        "for i in $(seq 50); do nc 127.0.0.1 7000 </dev/null && exit 0; sleep 0.1; done; exit 1";
    let client = world.bundle().sh(client).joining(first.pid, &["network"]);
    let out = world.run(&client, "client").ok();
    assert_eq!(out.stdout(), "hello\n");
    assert_eq!(server.exit_code(), 0);
}

#[test]
fn a_hostname_is_set_in_a_joined_namespace_too() {
    let world = World::new();
    let first = sandbox(&world);
    let bundle = world
        .bundle()
        .sh("hostname")
        .joining(first.pid, &["uts"])
        .with(|c| c["hostname"] = "renamed".into());
    assert_eq!(world.run(&bundle, "m").ok().stdout(), "renamed\n");
    assert_eq!(first.exec_sh(&[], "hostname").ok().stdout(), "renamed\n");
}

#[test]
fn a_namespace_that_is_not_there_cannot_be_joined() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0").joining(i32::MAX, &["network"]);
    let path = format!("/proc/{}/ns/net", i32::MAX);
    let words = format!("namespace path: lstat {path}: no such file or directory");
    let _ = world.try_create(&bundle, "c").fails_with(1, &words);
    let gone = sandbox(&world);
    let _ = gone.kill("KILL").ok();
    assert_eq!(gone.exit_code(), 137);
    let bundle = world.bundle().sh("exit 0").joining(gone.pid, &["pid"]);
    let words = format!("namespace path: lstat /proc/{}/ns/pid", gone.pid);
    let _ = world.try_create(&bundle, "c").fails_with(1, &words);
    // Another kind than the one it is.
    let other = sandbox_named(&world, "other");
    let path = format!("/proc/{}/ns/ipc", other.pid);
    let bundle = world.bundle().sh("exit 0").namespace("uts", Some(&path));
    let _ = world.try_create(&bundle, "c").fails_with(1, "");
}

fn sandbox_named<'w>(world: &'w World, name: &str) -> Container<'w> {
    let container = world.start(&world.bundle().sh("echo up; sleep 1000"), name);
    container.wait_for_output("up");
    container
}

/// In a pid namespace that is not its own, the end of a container's process is not
/// the end of what it has started.
#[test]
fn the_rest_of_a_container_in_a_shared_pid_namespace_is_killed_by_kill_all() {
    let world = World::new();
    let first = sandbox(&world);
    let script = "sleep 4711 & echo up; trap 'exit 7' TERM; while :; do sleep 0.1; done";
    let member = world
        .bundle()
        .sh(script)
        .joining(first.pid, &["pid", "network"]);
    let member = world.start(&member, "m");
    member.wait_for_output("up");
    let seen = || {
        let ps = first.exec_sh(&[], "ps").ok().stdout();
        (ps.contains("sleep 4711"), ps.contains("trap 'exit 7'"))
    };
    assert_eq!(seen(), (true, true));
    let listed = member.command(&["ps"]).ok().stdout();
    assert!(
        listed.contains("sleep 4711") && !listed.contains("hostname; echo up"),
        "{listed}"
    );
    assert!(
        member
            .exec_sh(&[], "ps")
            .ok()
            .stdout()
            .contains("hostname; echo up")
    );
    let _ = member.kill("TERM").ok();
    assert_eq!(member.exit_code(), 7);
    member.wait_for_status("stopped");
    assert_eq!(seen(), (true, false));
    let _ = member.kill("TERM").fails_with(1, "container not running");
    let _ = world
        .call(["kill", "--all", &member.id, "KILL"])
        .output()
        .ok();
    wait_until("end of the rest", SHORT, || seen() == (false, false));
    let _ = member.delete().ok();
    assert_eq!(first.status(), "running");
}

#[test]
fn deleting_a_container_in_a_shared_pid_namespace_ends_the_rest_of_it() {
    let world = World::new();
    let first = sandbox(&world);
    let member = world
        .bundle()
        .sh("sleep 4711 & echo up; exit 3")
        .joining(first.pid, &["pid", "network"]);
    let member = world.start(&member, "m");
    assert_eq!(member.exit_code(), 3);
    member.wait_for_status("stopped");
    let is_there = || {
        first
            .exec_sh(&[], "ps")
            .ok()
            .stdout()
            .contains("sleep 4711")
    };
    assert!(is_there());
    let _ = member.delete().ok();
    wait_until("end of the rest", SHORT, || !is_there());
}

#[test]
fn the_end_of_the_first_process_of_a_pid_namespace_is_the_end_of_all() {
    let world = World::new();
    let first = sandbox(&world);
    let member = world
        .bundle()
        .sh("echo up; while :; do sleep 0.1; done")
        .joining(first.pid, &["pid", "network"]);
    let member = world.start(&member, "m");
    member.wait_for_output("up");
    // One that does not share it goes on.
    let other = world
        .bundle()
        .sh("echo up; sleep 1000")
        .joining(first.pid, &["network"]);
    let other = world.start(&other, "o");
    other.wait_for_output("up");
    let _ = first.kill("KILL").ok();
    assert_eq!(first.exit_code(), 137);
    assert_eq!(member.exit_code(), 137);
    member.wait_for_status("stopped");
    assert_eq!(other.status(), "running");
    assert_eq!(other.exec_sh(&[], "echo here").ok().stdout(), "here\n");
    let _ = other.kill("KILL").ok();
    assert_eq!(other.exit_code(), 137);
}
