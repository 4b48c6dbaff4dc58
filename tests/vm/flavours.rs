//! The core of the tests again with the distribution's packaged kernel.

use std::fs;

use kuasar_runv_test_harness::{Flavour, Netns, Runtime, World, data, json, process};

fn world() -> World {
    World::with(Runtime::under_test(), Flavour::Packaged)
}

#[test]
fn the_packaged_kernel_is_another_one() {
    let release = |world: &World| world.run_script("uname -r").ok().stdout();
    assert_ne!(release(&world()), release(&World::new()));
}

#[test]
fn run_with_streams_exit_codes_and_mounts() {
    let world = world();
    let volume = world.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "volume\n").unwrap();
    fs::write(world.path("hosts"), "hosts\n").unwrap();
    let script = "cat; cat /vol/file /etc/hosts >&2; echo made >/vol/made; mkfifo /fifo
        touch /scratch/x || exit 1; exit 42";
    let bundle = world
        .bundle()
        .sh(script)
        .bind(&volume, "/vol")
        .bind(&world.path("hosts"), "/etc/hosts")
        .mount(json!({ "destination": "/scratch", "type": "tmpfs", "source": "tmpfs" }));
    let input = data::bytes(1, 300 * 1024);
    let out = world
        .run_call(&bundle, "c")
        .stdin_bytes(input.clone())
        .output();
    let out = out.exits_with(42);
    assert!(
        out.stdout == input,
        "{} of {} bytes",
        out.stdout.len(),
        input.len()
    );
    assert_eq!(out.stderr(), "volume\nhosts\n");
    assert_eq!(fs::read_to_string(volume.join("made")).unwrap(), "made\n");
    assert!(!bundle.rootfs().join("scratch/x").exists());
    world.assert_clean();
}

#[test]
fn create_start_kill_delete() {
    let world = world();
    let bundle = world.bundle().sh("echo up; sleep 1000");
    let container = world.create(&bundle, "c");
    assert_eq!(container.status(), "created");
    container.start();
    container.wait_for_output("up");
    assert!(process::is_alive(container.pid));
    let _ = container.kill("KILL").ok();
    assert_eq!(container.exit_code(), 137);
    container.wait_for_status("stopped");
    let _ = container.delete().ok();
    world.assert_clean();
}

#[test]
fn limits_filters_and_namespaces() {
    let world = world();
    let script = "cat /sys/fs/cgroup/pids.max; mkdir /tmp/x; echo mkdir=$?; hostname
        mknod /dev/kmsg2 c 1 11; (: <>/dev/kmsg2); echo device=$?; ls /sys/class/net";
    let bundle = world
        .bundle()
        .sh(script)
        .capabilities(&["CAP_MKNOD"])
        .with(|c| {
            let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.push(json!({ "type": "cgroup" }));
            c["linux"]["resources"]["pids"] = json!({ "limit": 33 });
            c["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" }],
            });
        });
    let out = world.run(&bundle, "c").ok();
    assert!(out.stdout().starts_with("33\n"), "{}", out.stdout());
    assert_eq!(out.fact("mkdir"), "1");
    assert_ne!(out.fact("device"), "0");
    assert!(out.stdout().contains("krt\n"));
    assert!(out.stdout().ends_with("lo\n"), "{}", out.stdout());
}

#[test]
fn the_network_of_a_namespace() {
    let world = world();
    let (inner, outer) = Netns::pair(&world);
    let bundle = world.bundle().sh("").probe("echo").network(&inner.path());
    let container = world.start(&bundle, "c");
    container.wait_for_output("listening");
    for (from, to) in [
        (&outer, "10.77.0.2:80"),
        (&outer, "[fd77::2]:80"),
        // What listens in the container does in the namespace.
        (&inner, "127.0.0.1:80"),
    ] {
        from.echo_tcp(to, 100_000);
    }
    let ping = container.exec_sh(&[], "ping -q -c 1 -W 5 10.77.0.1").ok();
    assert!(ping.stdout().contains(" 0% packet loss"));
}

#[test]
fn a_missing_program_fails_create() {
    let world = world();
    let bundle = world.bundle().args(["no-such-program"]);
    let _ = world
        .try_create(&bundle, "c")
        .fails_with(1, "executable file not found in $PATH");
    world.assert_clean();
}
