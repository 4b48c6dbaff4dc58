//! Several containers in one virtual machine: who belongs to which pod, and what its
//! members share.

use std::fs;
use std::path::Path;

use kuasar_runv_test_harness::{
    Bundle, Container, SHORT, World, json, process, reaper, wait_until,
};

/// The machine a container is in, and its namespaces there.
const WHERE: &str = "echo machine=$(cat /proc/sys/kernel/random/boot_id)
    for ns in net ipc uts pid; do echo $ns=$(readlink /proc/self/ns/$ns); done
    echo hostname=$(hostname)";

const WAIT: &str = "trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done";

/// Namespaces that members of a pod of CRI and of podman join.
const SHARED: [&str; 3] = ["network", "ipc", "uts"];

pub fn sandbox<'w>(world: &'w World, name: &str) -> Container<'w> {
    let container = world.start(&world.bundle().sh(WAIT), name);
    container.wait_for_output("up");
    container
}

/// A bundle with the annotations of CRI, in the pod of a sandbox.
pub fn member(world: &World, sandbox: &str, script: &str) -> Bundle {
    world.bundle().sh(script).annotations(&[
        ("io.kubernetes.cri.container-type", "container"),
        ("io.kubernetes.cri.sandbox-id", sandbox),
    ])
}

fn podman_member(world: &World, infra: &str, script: &str) -> Bundle {
    world.bundle().sh(script).annotations(&[
        ("io.kubernetes.cri-o.ContainerType", "container"),
        ("io.kubernetes.cri-o.SandboxID", infra),
    ])
}

fn machine(container: &Container<'_>) -> String {
    container.exec_sh(&[], WHERE).ok().fact("machine")
}

#[test]
fn a_pod_of_cri_is_one_machine_with_shared_namespaces() {
    let world = World::new();
    let id = world.id("s");
    let first = world
        .bundle()
        .sh(WAIT)
        .annotations(&[
            ("io.kubernetes.cri.container-type", "sandbox"),
            ("io.kubernetes.cri.sandbox-id", &id),
        ])
        .with(|c| c["hostname"] = "pod".into());
    let first = world.start(&first, "s");
    first.wait_for_output("up");
    let theirs = first.exec_sh(&[], WHERE).ok();
    for name in ["m1", "m2"] {
        let bundle = member(&world, &id, WHERE).joining(first.pid, &SHARED);
        let out = world.run(&bundle, name).ok();
        for key in ["machine", "net", "ipc", "uts"] {
            assert_eq!(out.fact(key), theirs.fact(key), "{key}");
        }
        assert_ne!(out.fact("pid"), theirs.fact("pid"));
        assert_eq!(out.fact("hostname"), "pod");
    }
    // On the host the stand-ins share them too, for engines and CNI.
    let bundle = member(&world, &id, WAIT)
        .joining(first.pid, &SHARED)
        .with(|c| {
            let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.push(json!({"type": "cgroup"}));
        });
    let third = world.start(&bundle, "m3");
    for (ns, shared) in [("net", true), ("ipc", true), ("uts", true), ("mnt", false)] {
        let link = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/{ns}")).unwrap();
        assert_eq!(link(first.pid) == link(third.pid), shared, "{ns}");
    }
    // What can be done to a container can be done to each of them.
    third.wait_for_output("up");
    let _ = third.command(&["pause"]).ok();
    assert_eq!(
        (third.status().as_str(), first.status().as_str()),
        ("paused", "running")
    );
    let _ = third.command(&["resume"]).ok();
    let stats = third.command(&["events", "--stats"]).ok().stdout();
    assert!(stats.contains(&third.id), "{stats}");
    let _ = third.command(&["update", "--pids-limit", "77"]).ok();
    let limit = "cat /sys/fs/cgroup/pids.max";
    assert_eq!(third.exec_sh(&[], limit).ok().stdout(), "77\n");
    let _ = third.kill("TERM").ok();
    assert_eq!(third.exit_code(), 0);
    let _ = third.delete().ok();
    assert_eq!(first.status(), "running");
}

/// The infra container of podman is like any other; its members name it and join it.
/// With namespaces of their own they live in its machine too.
#[test]
fn a_pod_of_podman_is_known_by_its_members() {
    let world = World::new();
    let infra = sandbox(&world, "infra");
    let theirs = infra.exec_sh(&[], WHERE).ok();
    let shared = podman_member(&world, &infra.id, WHERE).joining(infra.pid, &SHARED);
    let shared = world.run(&shared, "m1").ok();
    let own = world
        .run(&podman_member(&world, &infra.id, WHERE), "m2")
        .ok();
    assert_eq!(shared.fact("machine"), theirs.fact("machine"));
    assert_eq!(own.fact("machine"), theirs.fact("machine"));
    assert_eq!(shared.fact("net"), theirs.fact("net"));
    for ns in ["net", "ipc", "uts", "pid"] {
        assert_ne!(own.fact(ns), theirs.fact(ns), "{ns}");
    }
    // A network that is nobody's here is that of its stand-in, and its own in the guest.
    let foreign = Foreign::network();
    let adopting = podman_member(&world, &infra.id, WAIT);
    let adopting = adopting.joining(foreign.pid, &["network"]);
    let adopting = world.start(&adopting, "m6");
    let link = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_eq!(link(adopting.pid), link(foreign.pid));
    let in_guest = adopting.exec_sh(&[], WHERE).ok();
    assert_eq!(in_guest.fact("machine"), theirs.fact("machine"));
    assert_ne!(in_guest.fact("net"), theirs.fact("net"));
    // `--network container:X`, `--ipc container:X`, `--pid container:X`: no annotation.
    let by_path = world
        .bundle()
        .sh(WHERE)
        .joining(infra.pid, &["network", "pid"]);
    let by_path = world.run(&by_path, "m3").ok();
    for key in ["machine", "net", "pid"] {
        assert_eq!(by_path.fact(key), theirs.fact(key), "{key}");
    }
    assert_ne!(by_path.fact("ipc"), theirs.fact("ipc"));
    // Of a member as well as of the first, and of two of them.
    let member = podman_member(&world, &infra.id, WAIT);
    let member = world.start(&member, "m4");
    let both = world
        .bundle()
        .sh(WHERE)
        .joining(member.pid, &["network"])
        .joining(infra.pid, &["ipc"]);
    let both = world.run(&both, "m5").ok();
    assert_eq!(both.fact("ipc"), theirs.fact("ipc"));
    assert_eq!(
        both.fact("net"),
        member.exec_sh(&[], WHERE).ok().fact("net")
    );
}

/// A process with a network namespace of its own, as an engine's helper has.
struct Foreign {
    pid: i32,
}

impl Foreign {
    fn network() -> Foreign {
        let mut command = std::process::Command::new("/usr/bin/unshare");
        command.args(["--net", "/bin/sleep", "1000"]);
        let pid = reaper::spawn(&mut command).unwrap().pid;
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        wait_until("a network namespace", SHORT, || {
            fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| ns != own)
        });
        Foreign { pid }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // It may have ended.
        let _ = process::signal(self.pid, libc::SIGKILL);
        let _ = reaper::wait(self.pid, SHORT);
    }
}

/// A name for a namespace of a stand-in is as good as its path below /proc.
#[test]
fn a_namespace_is_known_whatever_it_is_called() {
    let world = World::new();
    let first = sandbox(&world, "s");
    let file = world.path("netns");
    fs::write(&file, "").unwrap();
    let source = format!("/proc/{}/ns/net", first.pid);
    mount_bind(&source, &file);
    let bundle = world.bundle().sh(WHERE).namespace("network", file.to_str());
    let out = world.run(&bundle, "m");
    unmount(&file);
    assert_eq!(out.ok().fact("machine"), machine(&first));
}

fn mount_bind(source: &str, target: &Path) {
    let c = |s: &str| std::ffi::CString::new(s).unwrap();
    let (source, target) = (c(source), c(target.to_str().unwrap()));
    // SAFETY: C strings that outlive the call; a bind mount needs no type or data.
    let rc = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            std::ptr::null(),
            libc::MS_BIND,
            std::ptr::null(),
        )
    };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
}

fn unmount(target: &Path) {
    let target = std::ffi::CString::new(target.to_str().unwrap()).unwrap();
    // SAFETY: a C string that outlives the call.
    let rc = unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let world = World::new();
    let (one, two) = (sandbox(&world, "one"), sandbox(&world, "two"));
    let refused = |bundle: &Bundle, words: &str| {
        let _ = world.try_create(bundle, "c").fails_with(1, words);
    };
    let pod = |sandbox: &str| member(&world, sandbox, "exit 0");
    refused(&pod(&world.id("nobody")), "which does not exist");
    refused(&pod("../../etc"), "which does not exist");
    refused(
        &pod(&one.id).joining(two.pid, &["network"]),
        "in another virtual machine",
    );
    let torn = world
        .bundle()
        .sh("exit 0")
        .joining(one.pid, &["ipc"])
        .joining(two.pid, &["network"]);
    refused(&torn, "a container can only be in one");
    let sandbox_of_its_own = world
        .bundle()
        .sh("exit 0")
        .annotations(&[("io.kubernetes.cri.container-type", "sandbox")])
        .joining(one.pid, &["network"]);
    refused(
        &sandbox_of_its_own,
        "a sandbox has a virtual machine of its own",
    );
    let host = world
        .bundle()
        .sh("exit 0")
        .namespace("network", Some("/proc/self/ns/net"));
    refused(&host, "use a bridge network and publish ports instead");
    let new_user = pod(&one.id).joining(one.pid, &["pid"]).with(|c| {
        let linux = &mut c["linux"];
        linux["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "user"}));
        for ids in ["uidMappings", "gidMappings"] {
            linux[ids] = json!([{"containerID": 0, "hostID": 0, "size": 1000}]);
        }
    });
    refused(&new_user, "join its user namespace as well");
    // A pod whose machine has ended takes nobody.
    crate::victims::kill_vm_of(&world, &one.id);
    refused(&pod(&one.id), "has ended");
    drop((one, two));
    world.assert_clean();
}

/// `/dev/shm` of a pod: one directory of the host, bound into all of its containers.
#[test]
fn members_share_memory() {
    let world = World::new();
    let shm = world.path("shm");
    fs::create_dir(&shm).unwrap();
    mount_tmpfs(&shm, "size=3m,mode=1777");
    let with_shm = |bundle: Bundle| {
        bundle
            .with(|c| {
                let mounts = c["mounts"].as_array_mut().unwrap();
                mounts.retain(|m| m["destination"] != "/dev/shm");
            })
            .bind(&shm, "/dev/shm")
    };
    let facts = "echo type=$(awk '$2 == \"/dev/shm\" {print $3}' /proc/mounts)
        echo size=$(df -k /dev/shm | awk 'NR == 2 {print $2}')
        echo mode=$(stat -c %a /dev/shm)";
    let script = format!("{facts}; echo one > /dev/shm/a; {WAIT}");
    let first = world.start(&with_shm(world.bundle().sh(&script)), "s");
    first.wait_for_output("up");
    let out = first.exec_sh(&[], facts).ok();
    assert_eq!(out.fact("type"), "tmpfs");
    assert_eq!(out.fact("size"), "3072");
    assert_eq!(out.fact("mode"), "1777");
    // Mapped by two containers it is the same memory: one waits for the other's word.
    let mapping = member(&world, &first.id, "exit 0").joining(first.pid, &SHARED);
    let mapping = with_shm(mapping).probe("shared-word /dev/shm/word");
    let a = world.start(&mapping, "a");
    let mapping = member(&world, &first.id, "exit 0").joining(first.pid, &SHARED);
    let mapping = with_shm(mapping).probe("shared-word /dev/shm/word");
    let b = world.start(&mapping, "b");
    for container in [&a, &b] {
        assert_eq!(container.exit_code(), 0, "{}", container.stdout());
        assert!(
            container.stdout().contains("both=true"),
            "{}",
            container.stdout()
        );
        let _ = container.delete().ok();
    }
    let later = member(&world, &first.id, "cat /dev/shm/a").joining(first.pid, &SHARED);
    assert_eq!(world.run(&with_shm(later), "m").ok().stdout(), "one\n");
    // With a tmpfs of its own it is its own.
    let own = member(&world, &first.id, "ls /dev/shm | wc -l").joining(first.pid, &SHARED);
    assert_eq!(world.run(&own, "own").ok().stdout(), "0\n");
    // A directory that is not an engine's is shared as any other.
    fs::write(shm.join("host"), "host\n").unwrap();
    let plain = member(&world, &first.id, "cat /dev/shm/host");
    assert_eq!(world.run(&with_shm(plain), "plain").ok().stdout(), "host\n");
    let _ = first.delete_force().ok();
    unmount(&shm);
}

fn mount_tmpfs(target: &Path, options: &str) {
    let target = std::ffi::CString::new(target.to_str().unwrap()).unwrap();
    let options = std::ffi::CString::new(options).unwrap();
    // SAFETY: C strings that outlive the call.
    let rc = unsafe {
        libc::mount(
            c"shm".as_ptr(),
            target.as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            options.as_ptr().cast(),
        )
    };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
}

/// Each with stdin, stdout, stderr and control: two hundred streams.
#[test]
fn fifty_containers_of_a_pod_have_all_their_streams() {
    const MEMBERS: usize = 50;
    let world = World::new();
    let first = sandbox(&world, "s");
    let bundle = member(
        &world,
        &first.id,
        "echo up; cat; echo to stderr >&2; exit 5",
    )
    .joining(first.pid, &SHARED);
    // Written once for all.
    let _ = bundle.path();
    let mut running: Vec<_> = (0..MEMBERS)
        .map(|n| {
            let call = world.call(["run", "--bundle"]).arg(bundle.dir());
            let call = call.arg(world.id(&format!("m{n}")));
            call.stdin_pipe().stdout_pipe().deadline(LONG).spawn()
        })
        .collect();
    // All of them at once: none has ended when the last is there.
    for member in &mut running {
        assert_eq!(read(member, 3), "up\n");
    }
    let list = world.call(["list", "-q"]).output().ok().stdout();
    assert_eq!(list.lines().count(), MEMBERS + 1);
    for (n, member) in running.iter_mut().enumerate() {
        let word = format!("word {n:03}\n");
        let stdin = member.stdin.as_mut().unwrap();
        std::io::Write::write_all(stdin, word.as_bytes()).unwrap();
        assert_eq!(read(member, word.len()), word);
    }
    for member in running {
        // Dropping stdin is the end of it.
        let out = member.wait().exits_with(5);
        assert_eq!(out.stderr(), "to stderr\n");
    }
    assert_eq!(first.status(), "running");
}

/// Emulated, fifty creates take a while.
const LONG: std::time::Duration = std::time::Duration::from_secs(180);

fn read(running: &mut kuasar_runv_test_harness::Running, len: usize) -> String {
    let mut bytes = vec![0; len];
    let stdout = running.stdout.as_mut().unwrap();
    std::io::Read::read_exact(stdout, &mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// With the distribution's kernel: what is in a pod does not depend on ours.
#[test]
fn a_pod_in_the_packaged_kernel() {
    use kuasar_runv_test_harness::{Flavour, Runtime};
    let world = World::with(Runtime::under_test(), Flavour::Packaged);
    let first = sandbox(&world, "s");
    let kinds = ["network", "ipc", "uts", "pid"];
    let bundle = member(&world, &first.id, WHERE).joining(first.pid, &kinds);
    let out = world.run(&bundle, "m").ok();
    let theirs = first.exec_sh(&[], WHERE).ok();
    for key in ["machine", "net", "ipc", "uts", "pid"] {
        assert_eq!(out.fact(key), theirs.fact(key), "{key}");
    }
}

/// What the container's user namespace is about is joined with it.
#[test]
fn a_user_namespace_is_joined_with_the_others() {
    let world = World::new();
    let mapped = |bundle: Bundle| {
        bundle.with(|c| {
            for ids in ["uidMappings", "gidMappings"] {
                c["linux"][ids] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
            }
        })
    };
    let facts = "echo user=$(readlink /proc/self/ns/user); echo net=$(readlink /proc/self/ns/net);
        echo map=$(awk '{print $2}' /proc/self/uid_map)";
    let first = mapped(world.bundle().sh(WAIT)).with(|c| {
        let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({"type": "user"}));
    });
    open_to_others(&first);
    let first = world.start(&first, "s");
    first.wait_for_output("up");
    let theirs = first.exec_sh(&[], facts).ok();
    assert_eq!(theirs.fact("map"), "100000");
    let kinds = ["user", "network", "ipc", "uts", "pid"];
    let bundle = mapped(world.bundle().sh(facts)).joining(first.pid, &kinds);
    open_to_others(&bundle);
    let own = world.run(&bundle, "m").ok();
    for key in ["user", "net", "map"] {
        assert_eq!(own.fact(key), theirs.fact(key), "{key}");
    }
}

/// The root of a user namespace is nobody on the host, and has to get to its rootfs.
fn open_to_others(bundle: &Bundle) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(bundle.dir(), fs::Permissions::from_mode(0o755)).unwrap();
}
