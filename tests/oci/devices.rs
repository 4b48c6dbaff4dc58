//! `linux.devices` and `linux.resources.devices`.

use kuasar_runv_test_harness::{Value, World, json};

fn rule(allow: bool, rest: Value) -> Value {
    let mut rule = rest;
    rule["allow"] = json!(allow);
    rule
}

#[test]
fn devices_of_every_type_are_made() {
    let world = World::new();
    let script = "for d in /dev/null2 /dev/sub/unbuffered /dev/disk /dev/fifo /elsewhere/null; do
        stat -c \"$d=%F %t:%T %a %u:%g\" $d; done; stat -c 'default=%a' /dev/zero";
    let bundle = world.bundle().sh(script).with(|c| {
        c["linux"]["devices"] = json!([
            { "path": "/dev/null2", "type": "c", "major": 1, "minor": 3,
              "fileMode": 0o640, "uid": 12, "gid": 34 },
            { "path": "/dev/sub/unbuffered", "type": "u", "major": 1, "minor": 5 },
            { "path": "/dev/disk", "type": "b", "major": 7, "minor": 1, "fileMode": 0o600 },
            { "path": "/dev/fifo", "type": "p", "fileMode": 0o622 },
            { "path": "/elsewhere/null", "type": "c", "major": 1, "minor": 3 },
            // Instead of the one that every container has.
            { "path": "/dev/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o444 },
        ]);
    });
    let out = world.run(&bundle, "c").ok();
    assert_eq!(
        out.fact("/dev/null2"),
        "character special file 1:3 640 12:34"
    );
    assert_eq!(
        out.fact("/dev/sub/unbuffered"),
        "character special file 1:5 666 0:0"
    );
    assert_eq!(out.fact("/dev/disk"), "block special file 7:1 600 0:0");
    assert_eq!(out.fact("/dev/fifo"), "fifo 0:0 622 0:0");
    assert_eq!(
        out.fact("/elsewhere/null"),
        "character special file 1:3 666 0:0"
    );
    assert_eq!(out.fact("default"), "444");
}

#[test]
fn every_container_has_the_devices_and_links_of_the_specification() {
    let world = World::new();
    let script =
        "for d in null zero full random urandom tty; do stat -c \"$d=%t:%T %a\" /dev/$d; done
        for l in fd stdin stdout stderr ptmx; do echo $l=$(readlink /dev/$l); done
        echo pts=$(stat -c %t:%T /dev/pts/ptmx); echo text | cat /dev/stdin
        echo out >/dev/stdout; echo err >/dev/stderr";
    let out = world.run(&world.bundle().sh(script), "c").ok();
    for (name, number) in [
        ("null", "1:3"),
        ("zero", "1:5"),
        ("full", "1:7"),
        ("random", "1:8"),
        ("urandom", "1:9"),
        ("tty", "5:0"),
    ] {
        assert_eq!(out.fact(name), format!("{number} 666"), "{name}");
    }
    assert_eq!(out.fact("fd"), "/proc/self/fd");
    assert_eq!(out.fact("stdin"), "/proc/self/fd/0");
    assert_eq!(out.fact("stdout"), "/proc/self/fd/1");
    assert_eq!(out.fact("stderr"), "/proc/self/fd/2");
    assert_eq!(out.fact("ptmx"), "pts/ptmx");
    assert_eq!(out.fact("pts"), "5:2");
    assert!(out.stdout().ends_with("text\nout\n"), "{}", out.stdout());
    assert!(out.stderr().contains("err\n"), "{}", out.stderr());
}

/// Opens `/dev/kmsg` (1:11), which no container may use by default, in three ways.
const KMSG: &str = "mknod /tmp/k c 1 11 || exit 9
    (: </tmp/k) 2>/dev/null; echo read=$?; (: >/tmp/k) 2>/dev/null; echo write=$?
    (: <>/tmp/k) 2>/dev/null; echo both=$?; (: </dev/zero); echo zero=$?";

/// What reading, writing and both return under these rules.
fn attempts(world: &World, name: &str, rules: Value) -> [String; 3] {
    let bundle = world
        .bundle()
        .sh(KMSG)
        .capabilities(&["CAP_MKNOD", "CAP_SYSLOG", "CAP_SYS_ADMIN"])
        .with(|c| c["linux"]["resources"]["devices"] = rules);
    let out = world.run(&bundle, name).ok();
    assert_eq!(out.fact("zero"), "0", "standard devices can always be used");
    ["read", "write", "both"].map(|key| out.fact(key))
}

#[test]
fn device_rules_hold_for_each_access() {
    let world = World::new();
    let deny = rule(false, json!({ "access": "rwm" }));
    let kmsg = |access: &str| json!({ "type": "c", "major": 1, "minor": 11, "access": access });
    for (name, rules, expected) in [
        ("none", json!([deny]), ["1", "1", "1"]),
        (
            "read",
            json!([deny, rule(true, kmsg("r"))]),
            ["0", "1", "1"],
        ),
        (
            "write",
            json!([deny, rule(true, kmsg("w"))]),
            ["1", "0", "1"],
        ),
        (
            "both",
            json!([deny, rule(true, kmsg("rw"))]),
            ["0", "0", "0"],
        ),
    ] {
        assert_eq!(attempts(&world, name, rules), expected, "{name}");
    }
}

#[test]
fn wildcards_in_device_rules() {
    let world = World::new();
    let deny = rule(false, json!({ "access": "rwm" }));
    let minor = rule(true, json!({ "type": "c", "major": 1, "access": "rwm" }));
    assert_eq!(
        attempts(&world, "minor", json!([deny, minor])),
        ["0", "0", "0"]
    );
    let other = rule(true, json!({ "type": "b", "major": 1, "access": "rwm" }));
    assert_eq!(
        attempts(&world, "type", json!([deny, other])),
        ["1", "1", "1"]
    );
}

#[test]
fn an_unknown_type_of_device_is_refused() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0").with(|c| {
        c["linux"]["devices"] = json!([{ "path": "/dev/x", "type": "z", "major": 1, "minor": 3 }]);
    });
    let _ = world.try_create(&bundle, "c").fails_with(1, "z");
    world.assert_clean();
}
