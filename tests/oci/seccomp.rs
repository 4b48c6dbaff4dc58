//! `linux.seccomp`: every action, return values, flags, architectures.

use kuasar_runv_test_harness::{Value, World, json};

/// A profile that allows everything but `mkdir`, which gets this action.
fn on_mkdir(action: &str) -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": action }],
    })
}

#[test]
fn each_action_does_what_it_says() {
    let world = World::new();
    let run = |profile: Value, name: &str| {
        let bundle = world
            .bundle()
            .sh("mkdir /tmp/x; echo status=$?")
            .with(|c| c["linux"]["seccomp"] = profile);
        let out = world.run(&bundle, name).ok();
        (
            out.fact("status"),
            out.stderr(),
            bundle.rootfs().join("tmp/x").exists(),
        )
    };
    // SIGSYS is 31.
    for action in [
        "SCMP_ACT_KILL",
        "SCMP_ACT_KILL_THREAD",
        "SCMP_ACT_KILL_PROCESS",
        "SCMP_ACT_TRAP",
    ] {
        let (status, _, made) = run(on_mkdir(action), action);
        assert_eq!((status.as_str(), made), ("159", false), "{action}");
    }
    let (status, stderr, made) = run(on_mkdir("SCMP_ACT_ERRNO"), "errno");
    assert!(
        stderr.contains("Operation not permitted") && !made,
        "{stderr}"
    );
    assert_eq!(status, "1");
    // Without a tracer the call fails with ENOSYS.
    let (_, stderr, made) = run(on_mkdir("SCMP_ACT_TRACE"), "trace");
    assert!(
        stderr.contains("Function not implemented") && !made,
        "{stderr}"
    );
    for action in ["SCMP_ACT_LOG", "SCMP_ACT_ALLOW"] {
        let (status, _, made) = run(on_mkdir(action), action);
        assert_eq!((status.as_str(), made), ("0", true), "{action}");
    }
}

#[test]
fn return_values_are_those_of_the_profile() {
    let world = World::new();
    let bundle = world.bundle().probe("system-calls").with(|c| {
        c["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                { "names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0 },
                { "names": ["sched_yield"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
                { "names": ["getpriority"], "action": "SCMP_ACT_ERRNO",
                  "args": [{ "index": 0, "value": 1, "op": "SCMP_CMP_GT" }] },
            ],
        });
    });
    let out = world.run(&bundle, "c").ok();
    assert_eq!(out.fact("getppid"), "0");
    assert_eq!(out.fact("sched_yield"), "38");
    assert_eq!(out.fact("getpriority 0"), "0");
    assert_eq!(out.fact("getpriority 2"), "1", "EPERM without errnoRet");
}

/// A default of ERRNO, as every engine's profile has, with the calls that are needed.
#[test]
fn a_list_of_what_is_allowed() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("echo allowed; mkdir /tmp/x; echo status=$?")
        .with(|c| {
            c["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{ "action": "SCMP_ACT_ALLOW", "names": ALLOWED }],
            });
        });
    let out = world.run(&bundle, "c").ok();
    assert!(out.stdout().starts_with("allowed\n"));
    assert_eq!(out.fact("status"), "1");
    assert!(
        out.stderr().contains("Permission denied"),
        "{}",
        out.stderr()
    );
}

/// What the runtime and a static shell need.
const ALLOWED: &[&str] = &[
    "accept",
    "accept4",
    "access",
    "arch_prctl",
    "bind",
    "brk",
    "capget",
    "capset",
    "chdir",
    "clone",
    "clone3",
    "close",
    "close_range",
    "connect",
    "dup",
    "dup2",
    "dup3",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "eventfd2",
    "execve",
    "exit",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fchdir",
    "fchown",
    "fcntl",
    "fstat",
    "fstatfs",
    "futex",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getpgrp",
    "getpid",
    "getppid",
    "getrandom",
    "getrlimit",
    "getsockopt",
    "gettid",
    "getuid",
    "ioctl",
    "kill",
    "listen",
    "lseek",
    "lstat",
    "madvise",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "nanosleep",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "pipe",
    "pipe2",
    "poll",
    "ppoll",
    "prctl",
    "pread64",
    "prlimit64",
    "read",
    "readlink",
    "readlinkat",
    "readv",
    "recvfrom",
    "recvmsg",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "rt_sigsuspend",
    "rt_sigtimedwait",
    "sched_getaffinity",
    "sched_yield",
    "seccomp",
    "sendmsg",
    "sendto",
    "set_robust_list",
    "set_tid_address",
    "setgid",
    "setgroups",
    "setrlimit",
    "setsid",
    "setuid",
    "shutdown",
    "sigaltstack",
    "socket",
    "socketpair",
    "stat",
    "statfs",
    "statx",
    "tgkill",
    "umask",
    "uname",
    "unlink",
    "vfork",
    "wait4",
    "waitid",
    "write",
    "writev",
];

/// runc 1.1 refuses every flag.
#[test]
fn flags_of_the_filter() {
    let world = World::new();
    if !world.runtime.is_ours {
        return;
    }
    let mut profile = on_mkdir("SCMP_ACT_ERRNO");
    profile["flags"] = json!([
        "SECCOMP_FILTER_FLAG_TSYNC",
        "SECCOMP_FILTER_FLAG_LOG",
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    ]);
    let bundle = world.bundle().sh("mkdir /tmp/x; echo status=$?");
    let bundle = bundle.with(|c| c["linux"]["seccomp"] = profile);
    assert_eq!(world.run(&bundle, "c").ok().fact("status"), "1");
}

#[test]
fn what_nobody_knows_is_refused() {
    let world = World::new();
    let refused = |change: fn(&mut Value), words: &str| {
        let mut profile = on_mkdir("SCMP_ACT_ERRNO");
        change(&mut profile);
        let bundle = world.bundle().sh("exit 0");
        let bundle = bundle.with(|c| c["linux"]["seccomp"] = profile);
        let _ = world.try_create(&bundle, "c").fails_with(1, words);
        world.assert_clean();
    };
    refused(
        |p| p["defaultAction"] = json!("SCMP_ACT_BOGUS"),
        "SCMP_ACT_BOGUS",
    );
    refused(
        |p| p["architectures"] = json!(["SCMP_ARCH_BOGUS"]),
        "SCMP_ARCH_BOGUS",
    );
    // A descriptor to the listener cannot leave a virtual machine; runc finds none.
    refused(
        |p| p["syscalls"][0]["action"] = json!("SCMP_ACT_NOTIFY"),
        "listenerPath",
    );
}

#[test]
fn a_filter_without_new_privileges_and_one_with() {
    let world = World::new();
    for no_new_privileges in [false, true] {
        let bundle = world.bundle().sh("mkdir /tmp/x; echo status=$?").with(|c| {
            c["process"]["noNewPrivileges"] = json!(no_new_privileges);
            c["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
            c["linux"]["seccomp"] = on_mkdir("SCMP_ACT_ERRNO");
        });
        let out = world.run(&bundle, &format!("c{no_new_privileges}")).ok();
        assert_eq!(out.fact("status"), "1");
    }
}

/// `value` is the mask and `valueTwo` what is compared with, as engines' profiles say of
/// `clone`.
#[test]
fn arguments_are_compared() {
    let world = World::new();
    let on_mode = |op: &str, value: u32, other: u32| {
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{
                "names": ["mkdir"], "action": "SCMP_ACT_ERRNO",
                "args": [{ "index": 1, "op": op, "value": value, "valueTwo": other }],
            }],
        })
    };
    // busybox asks for mode 777.
    for (name, profile, status) in [
        ("equal", on_mode("SCMP_CMP_EQ", 0o777, 0), "1"),
        ("other", on_mode("SCMP_CMP_NE", 0o777, 0), "0"),
        ("masked", on_mode("SCMP_CMP_MASKED_EQ", 0o5, 0o5), "1"),
        ("masked-other", on_mode("SCMP_CMP_MASKED_EQ", 0o5, 0o4), "0"),
    ] {
        let bundle = world.bundle().sh("mkdir /tmp/x; echo status=$?");
        let bundle = bundle.with(|c| c["linux"]["seccomp"] = profile);
        assert_eq!(
            world.run(&bundle, name).ok().fact("status"),
            status,
            "{name}"
        );
    }
}
