//! Bind mounts of unix sockets that a process of the host listens on.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use kuasar_runv_test_harness::probe::sockets::VISITS;
use kuasar_runv_test_harness::{World, json, listener};

#[test]
fn a_socket_of_the_host_is_reached() {
    let world = World::new();
    let socket = world.path("service.sock");
    listener::echo(&socket);
    let bundle = world.bundle().probe("socket /run/service.sock");
    let bundle = bundle.bind(&socket, "/run/service.sock");
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("answer"), "0:0 question");
    assert_eq!(out.fact("large"), "true");
    assert_eq!(out.fact("many"), "20");
    world.assert_clean();
}

/// The service sees who connects, and the mode of the socket says who may.
#[test]
fn other_users_are_who_they_are() {
    let world = World::new();
    let socket = world.path("service.sock");
    listener::echo(&socket);
    for (name, mode, answer) in [
        ("open", 0o666, "1000:1001 question"),
        ("closed", 0o600, "Permission denied (os error 13)"),
    ] {
        fs::set_permissions(&socket, Permissions::from_mode(mode)).unwrap();
        let bundle = world.bundle().probe("socket /service.sock");
        let bundle = bundle.bind(&socket, "/service.sock").with(|c| {
            c["process"]["user"] = json!({ "uid": 1000, "gid": 1001 });
        });
        let out = world.run(&bundle, name).ok();
        assert_eq!(out.fact("answer"), answer, "{name}");
    }
}

/// A service that listens later, or again, is reached as long as it is the same file.
#[test]
fn a_socket_that_nobody_listens_on() {
    let world = World::new();
    let socket = world.path("service.sock");
    drop(UnixListener::bind(&socket).unwrap());
    let bundle = world.bundle().probe("socket /service.sock");
    let out = world.run(&bundle.bind(&socket, "/service.sock"), "c").ok();
    let answer = out.fact("answer");
    // A virtual machine has accepted it before the host is asked.
    let accepted = ["", "Broken pipe (os error 32)"].contains(&answer.as_str());
    let refused = answer == "Connection refused (os error 111)";
    assert_eq!(
        (refused, accepted),
        (!world.runtime.is_ours, world.runtime.is_ours),
        "{answer:?}"
    );
    assert_eq!(out.fact("many"), "0");
}

/// More visitors than a socket has places, one after the other.
#[test]
fn a_client_that_has_gone_leaves_no_trace() {
    let world = World::new();
    let socket = world.path("service.sock");
    let taken = listener::negligent(&socket);
    let bundle = world.bundle().probe("visits /run/service.sock");
    let bundle = bundle.bind(&socket, "/run/service.sock");
    let container = world.start(&bundle, "c");
    for _ in 0..VISITS {
        let _: usize = taken.recv_timeout(Duration::from_secs(60)).unwrap();
    }
    let _ = container.delete_force().ok();
    world.assert_clean();
}
