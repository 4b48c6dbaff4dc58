//! The end of pods and of their members, ordered or not: nothing is left, and what
//! is still there goes on.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::{Container, SHORT, World, json, leaks, process, reaper, wait_until};

use crate::pods::{member, sandbox};
use crate::victims::{self, Victim};

const WAIT: &str = "echo up; while :; do sleep 0.1; done";

fn start_member<'w>(world: &'w World, sandbox: &Container<'_>, name: &str) -> Container<'w> {
    let bundle = member(world, &sandbox.id, WAIT).joining(sandbox.pid, &["network", "ipc", "uts"]);
    let container = world.start(&bundle, name);
    container.wait_for_output("up");
    container
}

fn says_where_it_is(container: &Container<'_>) -> String {
    let out = container.exec_sh(&[], "cat /proc/sys/kernel/random/boot_id");
    out.ok().stdout()
}

#[test]
fn a_member_comes_and_goes_while_the_pod_stays() {
    const ROUNDS: usize = 50;
    let world = World::new();
    let first = sandbox(&world, "s");
    let bundle = member(&world, &first.id, "cat /etc/file; exit 3")
        .joining(first.pid, &["network", "ipc", "uts"])
        .bind(&world.path("file"), "/etc/file");
    let bundle_path = bundle.path().to_owned();
    fs::write(world.path("file"), "content\n").unwrap();
    let sandboxer = victims::the(&world, Victim::Sandboxer);
    let mut before = None;
    for round in 0..ROUNDS {
        let call = world.call(["run", "--bundle"]).arg(&bundle_path);
        let out = call.arg(world.id("m")).output().exits_with(3);
        assert_eq!(out.stdout(), "content\n");
        if round == 4 {
            // By now everything that is made once has been made.
            before = Some(Usage::of(sandboxer, &first));
        }
    }
    let (before, after) = (before.unwrap(), Usage::of(sandboxer, &first));
    // A descriptor that is being closed is no leak.
    assert!(
        after.descriptors <= before.descriptors + 4,
        "{before:?} {after:?}"
    );
    assert_eq!(after.mounts, before.mounts);
    assert!(
        after.agent_kib <= before.agent_kib + 512,
        "{before:?} {after:?}"
    );
    assert!(
        after.guest_mounts <= before.guest_mounts,
        "{before:?} {after:?}"
    );
    assert!(
        after.guest_cgroups <= before.guest_cgroups,
        "{before:?} {after:?}"
    );
}

/// What a pod uses.
#[derive(Debug)]
struct Usage {
    descriptors: usize,
    mounts: usize,
    agent_kib: u64,
    guest_mounts: u64,
    guest_cgroups: u64,
}

impl Usage {
    fn of(sandboxer: i32, first: &Container<'_>) -> Usage {
        let count = |path: String| fs::read_dir(path).unwrap().count();
        let mounts = fs::read_to_string(format!("/proc/{sandboxer}/mountinfo")).unwrap();
        // In the machine's own pid namespace the agent is seen.
        let script = "awk '/VmRSS/ {print \"rss=\" $2}' /proc/1/status
            echo mounts=$(wc -l < /proc/1/mountinfo)
            echo cgroups=$(awk '$1 == \"pids\" {print $3}' /proc/cgroups)";
        let world = first.world();
        let bundle = member(world, &first.id, script).namespace("pid", None);
        let out = world.run(&bundle, "watcher").ok();
        let number = |key: &str| out.fact(key).parse().unwrap();
        Usage {
            descriptors: count(format!("/proc/{sandboxer}/fd")),
            mounts: mounts.lines().count(),
            agent_kib: number("rss"),
            guest_mounts: number("mounts"),
            guest_cgroups: number("cgroups"),
        }
    }
}

#[test]
fn the_machine_ends_with_its_first_container_and_members_are_deleted_in_any_order() {
    let world = World::new();
    for order in [["s", "a", "b"], ["a", "s", "b"], ["b", "a", "s"]] {
        let first = sandbox(&world, "s");
        let (a, b) = (
            start_member(&world, &first, "a"),
            start_member(&world, &first, "b"),
        );
        let mut gone = Vec::new();
        for name in order {
            let container = [("s", &first), ("a", &a), ("b", &b)]
                .into_iter()
                .find_map(|(n, c)| (n == name).then_some(c))
                .unwrap();
            let vm_is_there = !gone.contains(&"s");
            if vm_is_there {
                assert_eq!(container.status(), "running", "{order:?} {name}");
                let _ = container.delete().fails_with(1, "is not stopped: running");
                let _ = container.delete_force().ok();
            } else {
                assert_eq!(container.status(), "stopped", "{order:?} {name}");
                assert_eq!(container.exit_code(), 137);
                let _ = container
                    .kill("KILL")
                    .fails_with(1, "container not running");
                let _ = world
                    .call(["kill", "--all", &container.id, "9"])
                    .output()
                    .ok();
                let _ = container.delete().ok();
            }
            let _ = container.delete_force().ok();
            let _ = container.delete().fails_with(1, "container does not exist");
            gone.push(name);
        }
        world.assert_clean();
    }
}

/// A sandbox whose process has ended is still the pod's machine, until it is deleted;
/// one of the same id that is made anew is another machine.
#[test]
fn members_rejoin_a_sandbox_that_was_started_anew() {
    let world = World::new();
    let first = sandbox(&world, "s");
    let machine = says_where_it_is(&first);
    let member_of_old = start_member(&world, &first, "a");
    let _ = first.kill("TERM").ok();
    assert_eq!(first.exit_code(), 0);
    first.wait_for_status("stopped");
    assert_eq!(member_of_old.status(), "running");
    assert_eq!(says_where_it_is(&member_of_old), machine);
    // There is nothing of it left to join but its machine.
    let later = member(&world, &first.id, "cat /proc/sys/kernel/random/boot_id");
    assert_eq!(world.run(&later, "later").ok().stdout(), machine);
    let _ = first.delete().ok();
    let again = sandbox(&world, "s");
    assert_ne!(says_where_it_is(&again), machine);
    // The old member is not in the new machine, and its deletion does not touch it.
    assert_eq!(member_of_old.status(), "stopped");
    let _ = member_of_old.delete().ok();
    let rejoined = start_member(&world, &again, "a");
    assert_eq!(says_where_it_is(&rejoined), says_where_it_is(&again));
    assert_eq!(rejoined.status(), "running");
}

#[test]
fn members_are_created_and_deleted_at_the_same_time() {
    const MEMBERS: usize = 8;
    let world = World::new();
    let first = sandbox(&world, "s");
    let bundles: Vec<_> = (0..MEMBERS)
        .map(|n| {
            member(&world, &first.id, &format!("echo member {n}; exit {n}"))
                .joining(first.pid, &["network", "ipc", "uts"])
        })
        .collect();
    thread::scope(|scope| {
        for (n, bundle) in bundles.iter().enumerate() {
            let world = &world;
            scope.spawn(move || {
                let container = world.start(bundle, &format!("m{n}"));
                assert_eq!(container.exit_code(), i32::try_from(n).unwrap());
                assert_eq!(container.stdout(), format!("member {n}\n"));
                let _ = container.delete_force().ok();
            });
        }
    });
    assert_eq!(first.status(), "running");
    // And those of a pod that is being deleted.
    let running: Vec<_> = (0..3)
        .map(|n| start_member(&world, &first, &format!("r{n}")))
        .collect();
    thread::scope(|scope| {
        for container in running.iter().chain([&first]) {
            scope.spawn(move || container.delete_force().ok());
        }
    });
    world.assert_clean();
}

#[test]
fn what_is_killed_takes_only_what_belongs_to_it() {
    let world = World::new();
    let first = sandbox(&world, "s");
    let (a, b) = (
        start_member(&world, &first, "a"),
        start_member(&world, &first, "b"),
    );
    let machine = says_where_it_is(&first);
    // The stand-in of a member: its process ends, nothing else.
    victims::kill(&[a.pid]);
    a.wait_for_status("stopped");
    assert_eq!(b.status(), "running");
    let _ = a.delete().ok();
    let a = start_member(&world, &first, "a");
    assert_eq!(says_where_it_is(&a), machine);
    // A record that cannot be read: the process is found by its id.
    let state = world.root.join("containers").join(&a.id).join("state.json");
    fs::write(&state, "{ cut off").unwrap();
    let _ = a.delete_force().ok();
    let _ = a.wait_within(SHORT);
    for cgroup in leaks::cgroups(&a.id) {
        wait_until("removal of a cgroup", SHORT, || {
            fs::remove_dir(&cgroup).is_ok()
        });
    }
    let a = start_member(&world, &first, "a");
    // The machine: all of them stop, and can be deleted.
    victims::kill(&[victims::the(&world, Victim::Sandboxer)]);
    for container in [&a, &b, &first] {
        wait_until("status stopped", Duration::from_secs(2), || {
            container.status() == "stopped"
        });
        let _ = container.command(&["start"]).fails_with(1, "");
        let _ = container.delete().ok();
    }
    world.assert_clean();
}

#[test]
fn a_command_that_is_killed_while_it_creates_a_member_leaves_the_pod_alone() {
    let world = World::new();
    let first = sandbox(&world, "s");
    let bundle = member(&world, &first.id, "exit 4").joining(first.pid, &["network"]);
    let id = world.id("m");
    for delay in [0, 5, 15, 30, 60, 100, 150, 250] {
        let call = world.create_call(bundle.path(), "m");
        let files = ["stdout", "stderr"].map(|name| world.output_file(name));
        let [stdout, stderr] = files;
        let mut running = call.output_to(stdout, stderr).spawn();
        thread::sleep(Duration::from_millis(delay));
        running.kill();
        let asked = Instant::now();
        let _ = world.call(["delete", "--force", &id]).output().ok();
        assert!(
            asked.elapsed() < Duration::from_secs(20),
            "{:?}",
            asked.elapsed()
        );
        let out = world.run(&bundle, "m");
        assert_eq!(out.code(), 4, "after {delay} ms: {}", out.stderr());
    }
    assert_eq!(first.status(), "running");
}

/// A machine that hangs keeps nobody from removing its members by force; when it
/// goes on, the id can be used again.
#[test]
fn a_member_of_a_machine_that_hangs_is_deleted_by_force() {
    let world = World::new();
    let first = sandbox(&world, "s");
    for victim in [Victim::Vm, Victim::Sandboxer] {
        let a = start_member(&world, &first, "a");
        let hangs = victims::the(&world, victim);
        process::signal(hangs, libc::SIGSTOP).unwrap();
        let asked = Instant::now();
        let _ = a.delete_force().ok();
        assert!(
            asked.elapsed() < Duration::from_secs(30),
            "{victim:?}: {:?}",
            asked.elapsed()
        );
        let _ = a.wait_within(SHORT);
        let _ = a
            .command(&["state"])
            .fails_with(1, "container does not exist");
        process::signal(hangs, libc::SIGCONT).unwrap();
        let a = start_member(&world, &first, "a");
        assert_eq!(says_where_it_is(&a), says_where_it_is(&first));
        let _ = a.delete_force().ok();
    }
}

/// Engines that keep what has stopped, such as `ctr run -d`, do not keep its memory; and
/// `delete`, which most engines call at once, has nothing to wait for.
#[test]
fn a_machine_that_nobody_needs_ends_with_its_process() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("echo said; exit 3"), "c");
    assert_eq!(container.exit_code(), 3);
    assert_eq!(container.stdout(), "said\n");
    wait_until("end of the machine", Duration::from_secs(5), || {
        leaks::processes(world.name()).is_empty()
    });
    assert_eq!(container.status(), "stopped");
    let _ = container
        .kill("KILL")
        .fails_with(1, "container not running");
    let _ = container.delete().ok();
    world.assert_clean();
}

#[test]
fn what_an_exec_says_to_the_end_is_heard() {
    let world = World::new();
    let container = world.start(&world.bundle().sh(WAIT), "c");
    container.wait_for_output("up");
    let script = "echo begun; while :; do sleep 0.1; done";
    let exec = container.exec_detached(script, "e");
    wait_until("output of the exec", SHORT, || {
        fs::read_to_string(world.path("e.stdout")).is_ok_and(|text| text == "begun\n")
    });
    let _ = container.kill("KILL").ok();
    assert_eq!(container.exit_code(), 137);
    let ended = reaper::wait(exec, SHORT).expect("it ends with the container");
    assert_eq!(ended.signal(), Some(9));
    container.wait_for_status("stopped");
    let _ = container.delete().ok();
    world.assert_clean();
}

/// Without a pid namespace of its own, the rest of it goes on without its first process.
#[test]
fn what_outlives_its_first_process_keeps_the_machine() {
    let world = World::new();
    let script = "(while :; do date +%s%N >/alive; sleep 0.05; done) & sleep 0.3; exit 0";
    let bundle = world.bundle().sh(script).with(|c| {
        let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|n| n["type"] != "pid");
        c["root"]["readonly"] = json!(false);
    });
    let alive = bundle.rootfs().join("alive");
    let container = world.start(&bundle, "c");
    assert_eq!(container.exit_code(), 0);
    container.wait_for_status("stopped");
    let last = || fs::read_to_string(&alive).unwrap_or_default();
    // Twice, so that the second was written afterwards.
    for _ in 0..2 {
        let before = last();
        wait_until("a sign of life", SHORT, || last() != before);
    }
    let _ = world
        .call(["kill", "--all", &container.id, "KILL"])
        .output()
        .ok();
    let _ = container.delete().ok();
    world.assert_clean();
}
