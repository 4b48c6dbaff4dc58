//! Kills for lack of memory in a pod: the host's kernel is made to report them, and
//! nobody is harmed by it.

use std::fs;
use std::path::PathBuf;

use kuasar_runv_test_harness::cgroup::{self, OomListener};
use kuasar_runv_test_harness::{CALL, Container, SHORT, World, json, process, wait_until};

use crate::victims::{self, Victim};

const MEMORY: [&str; 2] = ["memory.oom_control", "memory.events"];

/// The memory cgroup of a process.
fn memory_cgroup(pid: i32) -> PathBuf {
    let file = cgroup::file(pid, "memory", MEMORY).expect("a cgroup with its memory");
    file.parent().unwrap().to_owned()
}

/// Where the sandboxer puts the machine while its cgroup has no room.
fn aside(world: &World) -> PathBuf {
    let sandboxer = victims::the(world, Victim::Sandboxer);
    memory_cgroup(sandboxer).with_file_name(format!("kuasar-runv-aside-{sandboxer}"))
}

fn start<'w>(world: &'w World, name: &str, script: &str) -> Container<'w> {
    let kind = if name == "pod" {
        "sandbox"
    } else {
        "container"
    };
    let annotations = [
        ("io.kubernetes.cri.container-type", kind),
        ("io.kubernetes.cri.sandbox-id", &world.id("pod")),
    ];
    let bundle = world.bundle().sh(script).annotations(&annotations);
    let bundle = bundle.with(|c| c["linux"]["resources"]["memory"] = json!({ "limit": 24 << 20 }));
    world.start(&bundle, name)
}

#[test]
fn a_report_concerns_one_container_and_the_machine_is_where_it_was() {
    let world = World::new();
    let greedy = "echo up; while :; do tail /dev/zero; echo killed; sleep 0.1; done";
    let pod = start(&world, "pod", "echo up; sleep 1000");
    let other = start(&world, "other", "echo up; sleep 1000");
    other.wait_for_output("up");
    let machine = [Victim::Sandboxer, Victim::Vm].map(|victim| victims::the(&world, victim));
    let before = machine.map(memory_cgroup);
    assert_eq!(before[0], memory_cgroup(pod.pid));

    // A member, whose children are killed again and again.
    let member = start(&world, "member", greedy);
    let listeners = [&pod, &other, &member].map(|container| OomListener::new(container.pid));
    wait_until("two kills", CALL, || {
        member.stdout().matches("killed").count() >= 2
    });
    let _ = member.kill("9").ok();
    assert_eq!(member.exit_code(), 137);
    let kills = || listeners.each_ref().map(OomListener::kills);
    assert_eq!(kills(), [0, 0, 1]);

    // The one whose cgroup has the machine.
    let out = pod.exec_sh(&[], "tail /dev/zero; echo code=$?").ok();
    assert_eq!(out.fact("code"), "137");
    let _ = pod.kill("9").ok();
    assert_eq!(pod.exit_code(), 137);
    assert_eq!(kills(), [1, 0, 1]);
    wait_until("the machine is back", SHORT, || {
        machine.map(memory_cgroup) == before && !aside(&world).exists()
    });
    let _ = other.exec_sh(&[], "exit 0").ok();
    assert!(process::is_alive(machine[1]));
}

/// Whatever dies in the middle of it.
#[test]
fn a_machine_that_ends_aside_leaves_nothing() {
    let world = World::new();
    let container = start(&world, "pod", "echo up; sleep 1000");
    container.wait_for_output("up");
    let aside = aside(&world);
    fs::create_dir(&aside).unwrap();
    for victim in [Victim::Sandboxer, Victim::Vm] {
        let pid = victims::the(&world, victim).to_string();
        fs::write(aside.join("cgroup.procs"), pid).unwrap();
    }
    victims::kill(&[victims::the(&world, Victim::Sandboxer)]);
    let _ = container.delete_force().ok();
    assert!(!aside.exists());
    world.assert_clean();
}
