//! `process`: identity, limits, the search for the program, priorities, and the settings
//! of the container's namespaces.

use kuasar_runv_test_harness::{Bundle, Value, World, json};

fn namespace(bundle: Bundle, kind: &str, present: bool) -> Bundle {
    bundle.with(|c| {
        let list = c["linux"]["namespaces"].as_array_mut().unwrap();
        list.retain(|n| n["type"] != kind);
        if present {
            list.push(json!({ "type": kind }));
        }
    })
}

/// `create` fails with these words and leaves nothing.
#[track_caller]
fn refused(world: &World, words: &str, change: impl FnOnce(&mut Value)) {
    let bundle = world.bundle().sh("exit 0").with(change);
    let _ = world.try_create(&bundle, "c").fails_with(1, words);
    world.assert_clean();
}

#[test]
fn the_rules_of_the_configuration_are_runcs_in_runcs_words() {
    let world = World::new();
    refused(&world, "uids and gids must be in range 0-2147483647", |c| {
        c["process"]["user"]["uid"] = json!(u32::MAX);
    });
    refused(
        &world,
        "malformed spec file: duplicated ns {\"ipc\" \"\"}",
        |c| {
            let list = c["linux"]["namespaces"].as_array_mut().unwrap();
            list.push(json!({ "type": "ipc" }));
        },
    );
    refused(
        &world,
        "unable to set hostname without a private UTS namespace",
        |c| {
            let list = c["linux"]["namespaces"].as_array_mut().unwrap();
            list.retain(|n| n["type"] != "uts");
        },
    );
    refused(&world, "args must not be empty", |c| {
        c["process"]["args"] = json!([])
    });
    refused(&world, "process property must not be empty", |c| {
        c["process"] = Value::Null
    });
    refused(
        &world,
        "invalid rootfs: stat /no/such: no such file or directory",
        |c| {
            c["root"]["path"] = json!("/no/such");
        },
    );
    refused(&world, "invalid environment variable: \"JUNK\"", |c| {
        c["process"]["env"] = json!(["JUNK"]);
    });
    refused(&world, "mkdir /etc/passwd: not a directory", |c| {
        c["process"]["cwd"] = json!("/etc/passwd");
    });
    refused(&world, "RLIMIT_BOGUS", |c| {
        c["process"]["rlimits"] = json!([{ "type": "RLIMIT_BOGUS", "soft": 1, "hard": 1 }]);
    });
    refused(&world, "invalid argument", |c| {
        c["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 9, "hard": 8 }]);
    });
    refused(&world, "/proc/self/oom_score_adj", |c| {
        c["process"]["oomScoreAdj"] = json!(2000)
    });
    refused(&world, "mappings found", |c| {
        let list = c["linux"]["namespaces"].as_array_mut().unwrap();
        list.push(json!({ "type": "user" }));
    });
    refused(&world, "rootfsPropagation=bogus is not supported", |c| {
        c["linux"]["rootfsPropagation"] = json!("bogus");
    });
}

#[test]
fn security_modules_that_are_not_there_are_refused_as_by_runc() {
    let world = World::new();
    let selinux = "selinux label is specified in config, but selinux is disabled or not supported";
    refused(&world, selinux, |c| {
        c["process"]["selinuxLabel"] = json!("system_u:system_r:svirt_t:s0");
    });
    refused(&world, "unable to apply apparmor profile", |c| {
        c["process"]["apparmorProfile"] = json!("docker-default");
    });
    refused(&world, "intelRdt", |c| {
        c["linux"]["intelRdt"] = json!({ "closID": "a", "l3CacheSchema": "L3:0=f" });
    });
    let bundle = world.bundle().sh("exit 0").with(|c| {
        c["process"]["apparmorProfile"] = json!("");
        c["process"]["selinuxLabel"] = json!("");
        c["linux"]["mountLabel"] = json!("");
        c["linux"]["intelRdt"] = json!({});
    });
    let _ = world.run(&bundle, "c").ok();
}

#[test]
fn sysctls_of_the_machine_are_refused() {
    let world = World::new();
    let set = |name: &'static str| move |c: &mut Value| c["linux"]["sysctl"] = json!({ name: "1" });
    refused(
        &world,
        "sysctl \"vm.swappiness\" is not in a separate kernel namespace",
        set("vm.swappiness"),
    );
    refused(
        &world,
        "sysctl \"kernel.hostname\" is not allowed as it conflicts with the OCI \"hostname\" field",
        set("kernel.hostname"),
    );
    refused(
        &world,
        "open /proc/sys/net/ipv4/nope: no such file or directory",
        set("net.ipv4.nope"),
    );
    refused(
        &world,
        "sysctl \"kernel.msgmax\" is not allowed in the hosts ipc namespace",
        |c| {
            let list = c["linux"]["namespaces"].as_array_mut().unwrap();
            list.retain(|n| n["type"] != "ipc");
            c["linux"]["sysctl"] = json!({ "kernel.msgmax": "1" });
        },
    );
}

#[test]
fn sysctls_may_be_written_with_slashes() {
    let world = World::new();
    let script = "cd /proc/sys; echo forward=$(cat net/ipv4/ip_forward)
        echo domain=$(cat kernel/domainname); echo mqueue=$(cat fs/mqueue/msg_max)";
    let bundle = world.bundle().sh(script).with(|c| {
        c["linux"]["sysctl"] = json!({
            "net/ipv4/ip_forward": "1", "kernel.domainname": "example.org",
            "fs.mqueue.msg_max": "20",
        });
    });
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("forward"), "1");
    assert_eq!(out.fact("domain"), "example.org");
    assert_eq!(out.fact("mqueue"), "20");
}

/// Newer engines and kernels have capabilities an older runtime does not know.
#[test]
fn unknown_capabilities_are_ignored_with_a_warning() {
    let world = World::new();
    let bundle = world.bundle().sh("grep CapBnd /proc/self/status");
    let bundle = bundle.capabilities(&["CAP_KILL", "CAP_FROM_THE_FUTURE"]);
    let out = world.run(&bundle, "c").ok();
    assert!(
        out.stdout().contains("0000000000000020"),
        "{}",
        out.stdout()
    );
    assert!(
        out.stderr()
            .contains("ignoring unknown or unavailable capabilities: [CAP_FROM_THE_FUTURE]"),
        "{}",
        out.stderr()
    );
}

#[test]
fn a_capability_that_is_effective_has_to_be_permitted() {
    let world = World::new();
    refused(&world, "ermitted", |c| {
        let set = c["process"]["capabilities"]["effective"]
            .as_array_mut()
            .unwrap();
        set.push(json!("CAP_CHOWN"));
    });
}

#[test]
fn the_search_for_the_program_is_that_of_runc() {
    let world = World::new();
    let bundle = |args: &[&str], path: &str, cwd: &str| {
        world.bundle().args(args).with(|c| {
            c["process"]["env"] = json!([format!("PATH={path}")]);
            c["process"]["cwd"] = json!(cwd);
        })
    };
    let runs = |args: &[&str], path: &str, cwd: &str| {
        assert_eq!(
            world.run(&bundle(args, path, cwd), "c").ok().stdout(),
            "x\n"
        );
    };
    runs(&["echo", "x"], "/nope:/etc/passwd:/bin", "/");
    runs(&["./busybox", "echo", "x"], "", "/bin");
    runs(&["bin/busybox", "echo", "x"], "", "/");
    let fails = |args: &[&str], path: &str, cwd: &str, words: &str| {
        let _ = world
            .try_create(&bundle(args, path, cwd), "c")
            .fails_with(1, words);
    };
    let relative = "cannot run executable found relative to current directory";
    fails(&["echo"], ":/nope", "/bin", relative);
    fails(&["echo"], "bin", "/", relative);
    fails(
        &[""],
        "/bin",
        "/",
        "exec: \"\": executable file not found in $PATH",
    );
    fails(
        &["passwd-not"],
        "/bin",
        "/",
        "executable file not found in $PATH",
    );
    fails(&["/tmp"], "/bin", "/", "exec: \"/tmp\": permission denied");
    fails(&["/bin/busybox/x"], "/bin", "/", "not a directory");
    world.assert_clean();
}

/// The configuration knows users by number only; names are the engine's business.
#[test]
fn user_names_mean_nothing() {
    let world = World::new();
    let bundle = world.bundle().sh("id -u").with(|c| {
        c["process"]["user"] = json!({ "uid": 0, "gid": 0, "username": "user" });
    });
    assert_eq!(world.run(&bundle, "c").ok().stdout(), "0\n");
    refused(&world, "string", |c| {
        c["process"]["user"] = json!({ "uid": "user", "gid": 0 });
    });
}

#[test]
fn home_of_a_user_without_an_entry_is_the_root() {
    let world = World::new();
    let bundle = world.bundle().sh("echo home=$HOME").with(|c| {
        c["process"]["user"] = json!({ "uid": 4711, "gid": 4711 });
    });
    assert_eq!(world.run(&bundle, "nobody").ok().fact("home"), "/");
    let bundle = world.bundle().sh("echo home=$HOME").with(|c| {
        c["process"]["env"] = json!(["PATH=/bin", "HOME=/given"]);
    });
    assert_eq!(world.run(&bundle, "given").ok().fact("home"), "/given");
}

/// So small that the runtime could not have set the container up with them.
#[test]
fn very_small_resource_limits_hold_for_the_program_only() {
    let world = World::new();
    let bundle = world.bundle().sh("ulimit -n; ulimit -H -n; ulimit -c");
    let bundle = bundle.with(|c| {
        c["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 10, "hard": 15 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
        ]);
    });
    assert_eq!(world.run(&bundle, "c").ok().stdout(), "10\n15\n0\n");
}

/// Hosts where the tests run may not allow it, so only a machine of its own can.
#[test]
fn hard_limits_can_be_raised() {
    let world = World::new();
    if !world.runtime.is_ours {
        return;
    }
    let bundle = world.bundle().sh("ulimit -H -n; ulimit -l").with(|c| {
        c["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 1_000_000, "hard": 1_000_000 },
            { "type": "RLIMIT_MEMLOCK", "soft": u64::MAX, "hard": u64::MAX },
        ]);
    });
    assert_eq!(
        world.run(&bundle, "c").ok().stdout(),
        "1000000\nunlimited\n"
    );
}

#[test]
fn a_working_directory_the_user_may_not_enter_is_entered() {
    let world = World::new();
    let bundle = world.bundle().sh("pwd").with(|c| {
        c["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
        c["process"]["cwd"] = json!("/private");
    });
    std::fs::create_dir(bundle.rootfs().join("private")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(bundle.rootfs().join("private"), mode).unwrap();
    assert_eq!(world.run(&bundle, "c").ok().stdout(), "/private\n");
}

/// runc 1.1 knows neither of these; what it does not know it ignores.
#[test]
fn priorities_and_personality() {
    let world = World::new();
    if !world.runtime.is_ours {
        return;
    }
    let script = "echo machine=$(uname -m); echo io=$(ionice -p 1)
        echo nice=$(cut -d' ' -f19 /proc/1/stat); echo policy=$(cut -d' ' -f41 /proc/1/stat)
        echo domain=$(cat /proc/sys/kernel/domainname)";
    let bundle = world.bundle().sh(script).with(|c| {
        c["domainname"] = json!("example.org");
        c["linux"]["personality"] = json!({ "domain": "LINUX32" });
        c["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 3 });
        c["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 5 });
        c["process"]["execCPUAffinity"] = json!({ "initial": "0", "final": "0" });
    });
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("machine"), "i686");
    assert_eq!(out.fact("io"), "best-effort: prio 3");
    assert_eq!(out.fact("nice"), "5");
    // SCHED_BATCH of sched.h
    assert_eq!(out.fact("policy"), "3");
    assert_eq!(out.fact("domain"), "example.org");
    refused(&world, "flags", |c| {
        c["linux"]["personality"] = json!({ "domain": "LINUX", "flags": ["X"] });
    });
    refused(&world, "scheduler.nice", |c| {
        c["process"]["scheduler"] = json!({ "policy": "SCHED_OTHER", "nice": 25 });
    });
    refused(&world, "priority", |c| {
        c["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 9 });
    });
}

/// runc 1.1 has no time namespaces.
#[test]
fn a_time_namespace_has_its_offsets() {
    let world = World::new();
    if !world.runtime.is_ours {
        return;
    }
    let bundle = namespace(world.bundle(), "time", true)
        .sh("cat /proc/uptime; cat /proc/self/timens_offsets | tr -s ' '")
        .with(|c| {
            c["linux"]["timeOffsets"] =
                json!({ "monotonic": { "secs": 1_000_000 }, "boottime": { "secs": 2_000_000 } });
        });
    let out = world.run(&bundle, "c").ok();
    assert!(out.stdout().starts_with("20000"), "{}", out.stdout());
    assert!(
        out.stdout().contains("monotonic 1000000 0"),
        "{}",
        out.stdout()
    );
    refused(&world, "time", |c| {
        c["linux"]["timeOffsets"] = json!({ "monotonic": { "secs": 1 } });
    });
}

#[test]
fn an_empty_path_of_a_namespace_is_a_new_one() {
    let world = World::new();
    let bundle = world.bundle().sh("echo pid=$$").with(|c| {
        for namespace in c["linux"]["namespaces"].as_array_mut().unwrap() {
            namespace["path"] = json!("");
        }
    });
    assert_eq!(world.run(&bundle, "c").ok().fact("pid"), "1");
}

#[test]
fn without_a_pid_namespace_the_processes_of_the_kernel_are_seen() {
    let world = World::new();
    let bundle = namespace(world.bundle(), "pid", false).sh("echo pid=$$; cat /proc/2/comm");
    let out = world.run(&bundle, "c").ok();
    assert_ne!(out.fact("pid"), "1");
}
