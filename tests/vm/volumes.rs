//! Volumes and devices, where the virtual machine shows.

use std::fs;

use kuasar_runv_test_harness::{SHORT, World, json, listener, wait_until};

use crate::pods;
use crate::victims::{self, Victim};

/// Options of the mounts of the pod's volumes, as the sandboxer has them.
fn volumes_on_the_host(world: &World) -> Vec<String> {
    let pid = victims::the(world, Victim::Sandboxer);
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let fields = table
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    fields
        .filter(|fields| fields[4].contains("/@volumes/"))
        .map(|fields| fields[5].split(',').next().unwrap().to_owned())
        .collect()
}

/// Whoever has broken out of the container cannot write either.
#[test]
fn what_is_only_read_is_read_only_on_the_host_and_attached_once() {
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    let bind = |destination: &str, option: &str| json!({ "destination": destination, "type": "bind", "source": volume, "options": ["rbind", option] });
    let reader = world
        .bundle()
        .sh("sleep 1000")
        .mount(bind("/a", "ro"))
        .mount(bind("/b", "ro"));
    let container = world.start(&reader, "r");
    assert_eq!(volumes_on_the_host(&world), ["ro"]);
    let _ = container.delete_force().ok();
    let writer = world
        .bundle()
        .sh("touch /a/x; echo a=$?; touch /b/x; echo b=$?; sleep 1000")
        .mount(bind("/a", "ro"))
        .mount(bind("/b", "rw"));
    let container = world.start(&writer, "w");
    container.wait_for_output("b=0\n");
    assert_eq!(container.stdout(), "a=1\nb=0\n");
    assert_eq!(volumes_on_the_host(&world), ["rw"]);
    assert!(volume.join("x").exists());
}

#[test]
fn huge_pages_are_the_guests() {
    let world = World::new();
    let pages = |options: &[&str]| json!({ "destination": "/huge", "type": "hugetlbfs", "source": "none", "options": options });
    let bundle = world
        .bundle()
        .probe("huge-pages /huge/file")
        .mount(pages(&["nosuid", "size=4M"]));
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("first"), "true");
    assert_eq!(out.fact("second"), "true");
    assert_ne!(out.fact("third"), "true", "only two were reserved");

    let bundle = world.bundle().sh("exit 0").mount(pages(&["size=64G"]));
    let out = world.try_create(&bundle, "much");
    let _ = out.fails_with(1, "huge pages of 2048 KiB");
    let bundle = world.bundle().sh("exit 0").mount(pages(&[]));
    let _ = world
        .try_create(&bundle, "none")
        .fails_with(1, "hugepageLimits");
    world.assert_clean();
}

#[test]
fn devices_of_the_guest_can_be_given_to_a_container() {
    let world = World::new();
    let device =
        |path: &str, minor: u32| json!({ "path": path, "type": "c", "major": 10, "minor": minor });
    let rule = |minor: u32| json!({ "allow": true, "type": "c", "major": 10, "minor": minor, "access": "rwm" });
    let script = "(: <>/dev/fuse) && echo fuse=ok; (: <>/dev/net/tun) && echo tun=ok
        tunctl -t tap7 >/dev/null; ip link show tap7 >/dev/null && echo tap=ok";
    let bundle = world
        .bundle()
        .sh(script)
        .capabilities(&["CAP_NET_ADMIN"])
        .with(|c| {
            c["linux"]["devices"] = json!([device("/dev/fuse", 229), device("/dev/net/tun", 200)]);
            let rules = &mut c["linux"]["resources"]["devices"];
            rules.as_array_mut().unwrap().extend([rule(229), rule(200)]);
        });
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("fuse"), "ok");
    assert_eq!(out.fact("tun"), "ok");
    assert_eq!(out.fact("tap"), "ok", "{}", out.stderr());
}

#[test]
fn devices_that_only_the_host_has_are_refused_by_name() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0").with(|c| {
        c["linux"]["devices"] =
            json!([{ "path": "/dev/kvm", "type": "c", "major": 10, "minor": 232 }]);
    });
    let _ = world.try_create(&bundle, "kvm").fails_with(1, "/dev/kvm");
    world.assert_clean();
}

/// What two containers of a pod map is the same memory, and what a volume may be
/// written by follows who uses it.
#[test]
fn a_volume_of_a_pod_is_one_for_all_its_containers() {
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    let bind = |destination: &str, option: &str| json!({ "destination": destination, "type": "bind", "source": volume, "options": ["rbind", option] });
    let reader = "while [ ! -e /ro/word ]; do sleep 0.1; done; echo seen; sleep 1000";
    let first = world.bundle().sh(reader).mount(bind("/ro", "ro"));
    let first = world.start(&first, "s");
    assert_eq!(volumes_on_the_host(&world), ["ro"]);

    let writers = ["a", "b"].map(|name| {
        let place = format!("/{name}");
        let bundle = pods::member(&world, &first.id, "").mount(bind(&place, "rw"));
        world.start(&bundle.probe(&format!("shared-word {place}/word")), name)
    });
    first.wait_for_output("seen");
    assert_eq!(volumes_on_the_host(&world), ["rw"], "attached once");
    for writer in &writers {
        assert_eq!(writer.exit_code(), 0);
        let said = writer.stdout();
        assert!(said.contains("both=true"), "{said}");
        let _ = writer.delete().ok();
    }
    wait_until("nobody to write", SHORT, || {
        volumes_on_the_host(&world) == ["ro"]
    });
    // And gone with the last of a pod that uses it.
    let other = world.path("other");
    fs::create_dir(&other).unwrap();
    let bundle = pods::member(&world, &first.id, "ls /other").bind(&other, "/other");
    let _ = world.run(&bundle, "m").ok();
    assert_eq!(volumes_on_the_host(&world).len(), 1);
}

/// All of a pod use one, it ends with the last of them, and nobody else in the
/// machine reaches it.
#[test]
fn a_socket_of_the_host_belongs_to_those_who_have_it() {
    let world = World::new();
    let socket = world.path("service.sock");
    listener::echo(&socket);
    let pod = world.bundle().sh("echo up; sleep 1000");
    let pod = world.start(&pod.bind(&socket, "/service.sock"), "s");
    pod.wait_for_output("up");
    let member = |check: &str| pods::member(&world, &pod.id, "").probe(check);
    let out = world.run(&member("socket /other").bind(&socket, "/other"), "with");
    assert_eq!(out.ok().fact("answer"), "0:0 question");
    // It has the port, as everybody has, and no token.
    let out = world.run(&member("vsock 1028"), "without").ok();
    assert_eq!(out.fact("back"), "0");
    let out = world.run(&member("socket /other").bind(&socket, "/other"), "again");
    assert_eq!(out.ok().fact("many"), "20");
}

/// Between the containers of a pod, as on one host; the host has locks of its own
/// (`docs/volumes.md`).
#[test]
fn locks_hold_between_the_containers_of_a_pod() {
    let world = World::new();
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    let pod = pods::sandbox(&world, "s");
    let member = |check: &str, name: &str| {
        let bundle = pods::member(&world, &pod.id, "").probe(&format!("{check} /v/file"));
        world.start(&bundle.bind(&volume, "/v"), name)
    };
    let holder = member("hold-locks", "holder");
    holder.wait_for_output("held=true");
    let on_the_host = fs::File::open(volume.join("file")).unwrap();
    on_the_host
        .try_lock()
        .expect("the host does not know of the lock");
    let other = member("want-locks", "other");
    assert_eq!(other.exit_code(), 0, "{}", other.stdout());
    let said = other.stdout();
    for fact in ["flock=false", "record=false", "waited=true"] {
        assert!(said.contains(fact), "{fact}: {said}");
    }
    assert_eq!(holder.exit_code(), 0);
}
