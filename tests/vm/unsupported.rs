//! What a virtual machine cannot give is refused by `create`, in words that say what.

use std::fs::{self, File};
use std::io::{Read, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};

use kuasar_runv_test_harness::{Bundle, Screen, World, json};

#[track_caller]
fn refused(world: &World, bundle: &Bundle, words: &str) {
    let _ = world.try_create(bundle, "c").fails_with(1, words);
    world.assert_clean();
}

#[test]
fn the_hosts_network_is_refused() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0").namespace("network", None);
    refused(&world, &bundle, "network");
}

#[test]
fn namespaces_of_foreign_processes_are_refused() {
    let world = World::new();
    for kind in ["pid", "ipc", "uts", "mnt"] {
        let path = format!("/proc/{}/ns/{kind}", std::process::id());
        let name = if kind == "mnt" { "mount" } else { kind };
        let bundle = world.bundle().sh("exit 0").namespace(name, Some(&path));
        refused(&world, &bundle, &path);
    }
}

#[test]
fn descriptors_without_a_counterpart_in_the_guest_are_refused() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0");
    let listener = UnixListener::bind(world.path("socket")).unwrap();
    let refused = |descriptors: Vec<OwnedFd>, words: &str| {
        let count = descriptors.len().to_string();
        let call = world.call(["create", "--preserve-fds", &count, "--bundle"]);
        let call = call.arg(bundle.path()).arg(world.id("c"));
        let _ = call.descriptors(descriptors).output().fails_with(1, words);
        world.assert_clean();
    };
    let cannot = "cannot preserve file descriptor";
    let null = || File::open("/dev/null").unwrap().into();
    refused(
        vec![null(), listener.into()],
        &format!("{cannot} 4: a listening socket cannot be passed into a virtual machine"),
    );
    let datagram = UnixDatagram::unbound().unwrap().into();
    refused(vec![datagram], &format!("{cannot} 3: a datagram socket"));
    let directory = File::open(world.dir()).unwrap().into();
    refused(vec![directory], &format!("{cannot} 3: a directory"));
    let (_screen, terminal) = Screen::open(24, 80);
    refused(vec![terminal.into()], &format!("{cannot} 3: a terminal"));
    let deleted = world.output_file("deleted");
    fs::remove_file(world.path("deleted")).unwrap();
    refused(vec![deleted.into()], "a file without a name");
    let many: Vec<OwnedFd> = (0..65).map(|_| null()).collect();
    refused(many, "cannot preserve 65 file descriptors: at most 64");
}

#[test]
fn as_many_descriptors_as_there_may_be_are_preserved() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("for i in $(seq 3 66); do echo $i >&$i || exit 1; done");
    let (mut readers, mut writers) = (Vec::new(), Vec::new());
    for _ in 0..64 {
        let (read, write) = pipe().unwrap();
        readers.push(read);
        writers.push(OwnedFd::from(write));
    }
    let call = world.call(["run", "--preserve-fds", "64", "--bundle"]);
    let call = call.arg(bundle.path()).arg(world.id("c"));
    let _ = call.descriptors(writers).output().ok();
    for (mut reader, number) in readers.into_iter().zip(3..) {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("{number}\n"));
    }
}

#[test]
fn an_unknown_file_system_is_refused() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0").mount(json!({
        "destination": "/x", "type": "no-such-file-system", "source": "none",
    }));
    refused(&world, &bundle, "no-such-file-system");
}

/// The library that makes containers in the guest must not change the id of the
/// container, whatever it contains.
#[test]
fn unusual_but_valid_ids_work() {
    let world = World::new();
    let bundle = world.bundle().sh("echo out");
    let long = "x".repeat(200 - world.name().len());
    for name in ["with.dots", "with_underscores", "plus+plus", &long] {
        let out = world.run(&bundle, name).ok();
        assert_eq!(out.stdout(), "out\n", "{name}");
    }
    assert!(fs::read_dir(world.root.join("containers")).is_ok_and(|mut d| d.next().is_none()));
}
