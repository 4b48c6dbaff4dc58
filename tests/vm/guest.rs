//! The container runs in a guest of its own, with a kernel of its own.

use std::fs;

use kuasar_runv_test_harness::world::configuration;
use kuasar_runv_test_harness::{Flavour, World, json};

use crate::pods;

#[test]
fn the_kernel_is_the_guests() {
    let world = World::new();
    let out = world
        .run_script("uname -r; echo boot=$(cat /proc/sys/kernel/random/boot_id)")
        .ok();
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(out.stdout().lines().next().unwrap(), host.trim());
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_ne!(out.fact("boot"), boot.trim());
}

#[test]
fn two_containers_have_two_kernels() {
    let world = World::new();
    let script = "cat /proc/sys/kernel/random/boot_id";
    let ids: Vec<_> = (0..2)
        .map(|_| world.run_script(script).ok().stdout())
        .collect();
    assert_ne!(ids[0], ids[1]);
}

/// runc 1.1.5 does not know it, the runtime specification since 1.1 does.
#[test]
fn the_domain_name_is_set() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("cat /proc/sys/kernel/domainname")
        .with(|c| {
            c["domainname"] = json!("example.test");
        });
    assert_eq!(world.run(&bundle, "c").ok().stdout(), "example.test\n");
}

/// A container is alone in its VM: nothing of the host, the agent or the share shows.
#[test]
fn nothing_of_the_host_or_the_agent_shows() {
    let world = World::new();
    let script = "ls /; echo ---; cat /proc/mounts; echo ---; ps; ls -l /proc/self/fd | wc -l | sed s/^/fds=/";
    let bundle = world.bundle().sh(script);
    let out = world.run(&bundle, "c").ok();
    let text = out.stdout();
    assert!(
        !text.contains(world.name()),
        "a path of the host shows:\n{text}"
    );
    assert!(!text.contains("agent"), "the agent shows:\n{text}");
    // total, 0, 1, 2 and ls's own directory.
    assert_eq!(out.fact("fds"), "5", "{text}");
}

/// A container without a pid namespace is next to the guest's agent, not to the host's processes.
#[test]
fn host_pid_means_the_guests_processes() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("cat /proc/1/comm; ls -d /proc/[0-9]* | wc -l")
        .with(|c| {
            let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|n| n["type"] != "pid");
        });
    let out = world.run(&bundle, "c").ok();
    let host = fs::read_to_string("/proc/1/comm").unwrap();
    assert_ne!(out.stdout().lines().next().unwrap(), host.trim());
}

/// A new machine does not wait for randomness, and does not have that of another.
#[test]
fn every_machine_has_randomness_of_its_own_from_the_start() {
    let world = World::new();
    let script = "uptime() { cut -d ' ' -f 1 /proc/uptime | tr -d .; }
        before=$(uptime); echo random=$(head -c 32 /dev/random | od -An -tx1 | tr -d ' \n')
        echo hundredths=$(($(uptime) - before)); echo uuid=$(cat /proc/sys/kernel/random/uuid)";
    let outs = ["a", "b"].map(|name| world.run(&world.bundle().sh(script), name).ok());
    for out in &outs {
        assert_eq!(out.fact("random").len(), 64);
        let hundredths: u64 = out.fact("hundredths").parse().unwrap();
        assert!(hundredths < 200, "{hundredths}");
    }
    for key in ["random", "uuid"] {
        assert_ne!(outs[0].fact(key), outs[1].fact(key), "{key}");
    }
}

/// They are those of namespaces: a member that joins them sees them, and one that has
/// its own does not.
#[test]
fn sysctls_are_the_pods_or_the_containers() {
    let world = World::new();
    let show = "echo msgmax=$(cat /proc/sys/kernel/msgmax)
        echo ttl=$(cat /proc/sys/net/ipv4/ip_default_ttl)";
    let set = |msgmax: &str, ttl: &str| json!({ "kernel.msgmax": msgmax, "net.ipv4.ip_default_ttl": ttl });
    let pod = world.bundle().sh("echo up; sleep 1000");
    let pod = pod.with(|c| c["linux"]["sysctl"] = set("4097", "5"));
    let pod = world.start(&pod, "s");
    pod.wait_for_output("up");
    let values = |out: &kuasar_runv_test_harness::Output| (out.fact("msgmax"), out.fact("ttl"));
    let own = pods::member(&world, &pod.id, show);
    let own = own.with(|c| c["linux"]["sysctl"] = set("4098", "6"));
    let out = world.run(&own, "own").ok();
    assert_eq!(values(&out), ("4098".into(), "6".into()));
    let kinds = ["network", "ipc"];
    let joined = pods::member(&world, &pod.id, show).joining(pod.pid, &kinds);
    let out = world.run(&joined, "joined").ok();
    assert_eq!(values(&out), ("4097".into(), "5".into()));
    let plain = world
        .run(&pods::member(&world, &pod.id, show), "plain")
        .ok();
    assert_eq!(values(&plain), ("8192".into(), "64".into()));
    assert_eq!(
        values(&pod.exec_sh(&[], show).ok()),
        ("4097".into(), "5".into())
    );
}

/// A PC has a hole below 4 GiB, where its devices are: the rest of the memory is above.
#[test]
fn several_processors_and_memory_beyond_the_hole_of_a_pc() {
    let mut world = World::new();
    let text = configuration(Flavour::Source);
    world.configure(&format!("{text}[vm]\nvcpus = 2\nmemory_mib = 5120\n"));
    let out = world
        .run_script(
            "echo cpus=$(nproc)
            while read name kib rest; do
                if [ $name = MemTotal: ]; then echo mib=$((kib / 1024)); fi
            done < /proc/meminfo
            for cpu in 0 1; do
                taskset -c $cpu sh -c 'while read name n rest; do
                    if [ $name = Cpus_allowed_list: ]; then echo $n; fi
                done < /proc/self/status' &
            done
            wait",
        )
        .ok();
    assert_eq!(out.fact("cpus"), "2");
    let mib: u32 = out.fact("mib").parse().unwrap();
    assert!(mib > 4800, "{mib} MiB");
    let mut ran: Vec<_> = out
        .stdout()
        .lines()
        .filter(|line| !line.contains('='))
        .map(str::to_owned)
        .collect();
    ran.sort();
    assert_eq!(ran, ["0", "1"]);
}
