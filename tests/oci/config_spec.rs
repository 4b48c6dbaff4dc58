//! `config.json`: the process, its rights and limits, what it sees of the system.

use kuasar_runv_test_harness::{Value, World, json};

#[test]
fn environment_arguments_and_working_directory() {
    let world = World::new();
    let bundle = world
        .bundle()
        .args([
            "/bin/sh",
            "-c",
            "echo cwd=$(pwd); echo args=$#-$0-$1; env",
            "zero",
            "one two",
        ])
        .with(|c| {
            c["process"]["cwd"] = json!("/not/there/yet");
            c["process"]["env"] = json!(["PATH=/bin", "PLAIN=value", "BLANKS= a  b ", "EMPTY="]);
        });
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("cwd"), "/not/there/yet");
    assert_eq!(out.fact("args"), "1-zero-one two");
    assert_eq!(out.fact("PATH"), "/bin");
    assert_eq!(out.fact("PLAIN"), "value");
    assert_eq!(out.fact("BLANKS"), " a  b ");
    assert_eq!(out.fact("EMPTY"), "");
    assert!(bundle.rootfs().join("not/there/yet").is_dir());
    // Nothing of the runtime's own environment.
    assert!(!out.stdout().contains("KUASAR"), "{}", out.stdout());
}

#[test]
fn home_is_set_from_the_containers_passwd() {
    let world = World::new();
    let bundle = world.bundle().sh("echo home=$HOME");
    assert_eq!(world.run(&bundle, "root").ok().fact("home"), "/root");
    let bundle = world.bundle().sh("echo home=$HOME").with(|c| {
        c["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    });
    assert_eq!(world.run(&bundle, "user").ok().fact("home"), "/tmp");
}

#[test]
fn user_groups_and_umask() {
    let world = World::new();
    let script = "cd /tmp; touch file; stat -c 'owner=%u:%g %a' file
        grep -E '^(Uid|Gid|Groups):' /proc/self/status | tr -s '\\t ' ' '; umask | sed s/^/umask=/";
    let bundle = world.bundle().sh(script).with(|c| {
        c["process"]["user"] =
            json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 77], "umask": 0o027 });
    });
    let out = world.run(&bundle, "c").ok();
    let text = out.stdout();
    assert!(text.contains("Uid: 1000 1000 1000 1000"), "{text}");
    assert!(text.contains("Gid: 1001 1001 1001 1001"), "{text}");
    assert!(text.contains("Groups: 5 77"), "{text}");
    assert_eq!(out.fact("umask"), "0027");
    assert_eq!(out.fact("owner"), "1000:1001 640");
}

/// One line of /proc/self/status.
fn status_line(text: &str, key: &str) -> String {
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {key} in {text}"))
        .trim()
        .to_owned()
}

#[test]
fn capabilities_are_exactly_those_of_the_configuration() {
    // Bits of linux/capability.h: CHOWN 0, KILL 5, NET_RAW 13.
    const CHOWN_KILL_RAW: &str = "0000000000002021";
    const KILL: &str = "0000000000000020";
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("cat /proc/self/status; chroot / true")
        .with(|c| {
            let all = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"]);
            c["process"]["capabilities"] = json!({
                "bounding": all, "permitted": all, "effective": all,
                "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"],
            });
        });
    let out = world.run(&bundle, "root");
    let text = out.stdout();
    for (set, expected) in [
        ("CapBnd", CHOWN_KILL_RAW),
        ("CapPrm", CHOWN_KILL_RAW),
        ("CapEff", CHOWN_KILL_RAW),
        ("CapInh", KILL),
        ("CapAmb", KILL),
    ] {
        assert_eq!(status_line(&text, set), expected, "{set}");
    }
    assert_eq!(out.code(), 1, "chroot must be refused: {}", out.stderr());

    // Of an ordinary user only the ambient ones are left after execve.
    let bundle = bundle.sh("cat /proc/self/status").with(|c| {
        c["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    });
    let text = world.run(&bundle, "user").ok().stdout();
    assert_eq!(status_line(&text, "CapEff"), KILL);
}

#[test]
fn no_new_privileges_is_set_only_when_asked_for() {
    let world = World::new();
    for (wanted, shown) in [(true, "1"), (false, "0")] {
        let bundle = world.bundle().args(["cat", "/proc/self/status"]);
        let bundle = bundle.with(|c| c["process"]["noNewPrivileges"] = json!(wanted));
        let text = world.run(&bundle, &format!("c{shown}")).ok().stdout();
        assert_eq!(status_line(&text, "NoNewPrivs"), shown);
    }
}

#[test]
fn rlimits_and_oom_score() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("cat /proc/self/limits; cat /proc/self/oom_score_adj");
    let bundle = bundle.with(|c| {
        c["process"]["oomScoreAdj"] = json!(321);
        c["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 123, "hard": 456 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
            { "type": "RLIMIT_FSIZE", "soft": 65536, "hard": 131_072 },
        ]);
    });
    let text = world.run(&bundle, "c").ok().stdout();
    let words: Vec<Vec<&str>> = text
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    for row in [
        ["Max", "open", "files", "123", "456", "files"],
        ["Max", "file", "size", "65536", "131072", "bytes"],
    ] {
        assert!(words.iter().any(|w| w[..] == row), "{row:?} in {text}");
    }
    assert!(
        words
            .iter()
            .any(|w| w.starts_with(&["Max", "core", "file", "size", "0", "0"]))
    );
    assert_eq!(text.lines().last(), Some("321"));
}

#[test]
fn the_hostname_is_the_containers() {
    let world = World::new();
    let bundle = world.bundle().sh("hostname; cat /proc/sys/kernel/hostname");
    let bundle = bundle.with(|c| c["hostname"] = json!("a-name-of-its-own"));
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.stdout(), "a-name-of-its-own\na-name-of-its-own\n");
}

#[test]
fn a_read_only_root_cannot_be_written() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("touch /file; echo touch=$?; echo x >/etc/passwd; echo redirect=$?; touch /dev/shm/ok && echo shm=ok")
        .with(|c| c["root"]["readonly"] = json!(true));
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("touch"), "1");
    assert_eq!(out.fact("redirect"), "1");
    assert_eq!(out.fact("shm"), "ok");
    assert!(
        out.stderr().contains("Read-only file system"),
        "{}",
        out.stderr()
    );
    assert!(!bundle.rootfs().join("file").exists());
}

#[test]
fn masked_and_read_only_paths() {
    let world = World::new();
    let bundle = world.bundle().sh(
        "echo kcore=$(head -c 16 /proc/kcore | wc -c); echo firmware=$(ls /sys/firmware | wc -l)
        echo masked=$(wc -c </masked); echo maskedDir=$(ls /masked-dir | wc -l)
        echo 1 >/proc/sys/vm/drop_caches; echo sys=$?
        touch /fixed/new; echo fixed=$?; echo missing=ok",
    );
    for (name, text) in [
        ("masked", "hidden"),
        ("masked-dir/file", ""),
        ("fixed/old", ""),
    ] {
        let path = bundle.rootfs().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let bundle = bundle.with(|c| {
        let push = |list: &mut Value, path| list.as_array_mut().unwrap().push(json!(path));
        for path in ["/masked", "/masked-dir", "/not/there"] {
            push(&mut c["linux"]["maskedPaths"], path);
        }
        for path in ["/fixed", "/not/there/either"] {
            push(&mut c["linux"]["readonlyPaths"], path);
        }
    });
    let out = world.run(&bundle, "c").ok();
    for key in ["kcore", "firmware", "masked", "maskedDir"] {
        assert_eq!(out.fact(key), "0", "{key}");
    }
    assert_eq!(out.fact("sys"), "1");
    assert_eq!(out.fact("fixed"), "1");
    assert_eq!(out.fact("missing"), "ok");
}

#[test]
fn sysctls_of_the_containers_namespaces() {
    let world = World::new();
    let bundle = world.bundle().sh(
        "cd /proc/sys; echo forward=$(cat net/ipv4/ip_forward); echo msgmax=$(cat kernel/msgmax)
        echo sem=$(cat kernel/sem | tr '\\t' ' ')",
    );
    let bundle = bundle.with(|c| {
        c["linux"]["sysctl"] = json!({
            "net.ipv4.ip_forward": "1", "kernel.msgmax": "12345", "kernel.sem": "250 32001 32 129",
        });
    });
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("forward"), "1");
    assert_eq!(out.fact("msgmax"), "12345");
    assert_eq!(out.fact("sem"), "250 32001 32 129");
}

#[test]
fn devices_are_made_and_their_use_is_controlled() {
    let world = World::new();
    let script = "stat -c 'made=%F %t:%T %a %u:%g' /dev/krt/null
        echo x >/dev/krt/null; echo allowed=$?
        mknod /dev/kmsg2 c 1 11; echo mknod=$?
        (: <>/dev/kmsg2); echo open=$?
        for d in null zero full random urandom tty ptmx; do [ -e /dev/$d ] || echo missing $d; done
        echo zero=$(head -c 3 /dev/zero | wc -c); echo x >/dev/full; echo full=$?
        echo links=$(readlink /dev/fd) $(readlink /dev/stdin)";
    let make = |allow: bool| {
        let bundle = world.bundle().sh(script);
        bundle
            .capabilities(&["CAP_MKNOD", "CAP_SYSLOG", "CAP_DAC_OVERRIDE"])
            .with(|c| {
                c["linux"]["devices"] = json!([{
                    "path": "/dev/krt/null", "type": "c", "major": 1, "minor": 3,
                    "fileMode": 0o640, "uid": 12, "gid": 34,
                }]);
                let mut rules = vec![json!({ "allow": false, "access": "rwm" })];
                if allow {
                    rules.push(
                    json!({ "allow": true, "type": "c", "major": 1, "minor": 11, "access": "rw" }),
                );
                }
                c["linux"]["resources"]["devices"] = json!(rules);
            })
    };
    let denied = world.run(&make(false), "denied").ok();
    assert_eq!(denied.fact("made"), "character special file 1:3 640 12:34");
    assert_eq!(denied.fact("allowed"), "0");
    assert_eq!(denied.fact("mknod"), "0", "{}", denied.stderr());
    assert_ne!(denied.fact("open"), "0");
    assert!(
        denied.stderr().contains("Operation not permitted"),
        "{}",
        denied.stderr()
    );
    assert!(!denied.stdout().contains("missing"), "{}", denied.stdout());
    assert_eq!(denied.fact("zero"), "3");
    assert_ne!(denied.fact("full"), "0");
    assert_eq!(denied.fact("links"), "/proc/self/fd /proc/self/fd/0");
    let allowed = world.run(&make(true), "allowed").ok();
    assert_eq!(allowed.fact("open"), "0", "{}", allowed.stderr());
}

#[test]
fn seccomp_filters_calls_by_name_and_argument() {
    let world = World::new();
    let bundle = world.bundle().probe("system-calls").with(|c| {
        c["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                { "names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 77 },
                { "names": ["getpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 78,
                  "args": [{ "index": 0, "value": 2, "op": "SCMP_CMP_EQ" }] },
                { "names": ["a_call_nobody_knows"], "action": "SCMP_ACT_ERRNO" },
            ],
        });
    });
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("getppid"), "77");
    assert_eq!(out.fact("sched_yield"), "0");
    assert_eq!(out.fact("getpriority 0"), "0");
    assert_eq!(out.fact("getpriority 2"), "78");
}

#[test]
fn seccomp_can_kill_the_process() {
    let world = World::new();
    let bundle = world.bundle().sh("mkdir /tmp/x; exit $?").with(|c| {
        c["process"]["noNewPrivileges"] = json!(false);
        c["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS" }],
        });
    });
    // 128 + SIGSYS, as the shell reports its child.
    let _ = world.run(&bundle, "c").exits_with(159);
    assert!(!bundle.rootfs().join("tmp/x").exists());
}

#[test]
fn the_container_has_namespaces_of_its_own() {
    let world = World::new();
    let bundle = world.bundle().sh(
        "echo pid=$$; echo interfaces=$(ls /sys/class/net | grep -v -E 'tunl|sit|gre|ip6|erspan|vti' )
        ip link | grep -q 'lo:.*UP' && echo lo=up; echo processes=$(ls -d /proc/[0-9]* | wc -l)",
    );
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("pid"), "1");
    assert_eq!(out.fact("interfaces"), "lo");
    assert_eq!(out.fact("lo"), "up");
    let processes: u32 = out.fact("processes").parse().unwrap();
    assert!(processes <= 4, "{processes}");
    let bundle = world.bundle().probe("network");
    assert_eq!(world.run(&bundle, "network").ok().fact("loopback"), "ok");
}
