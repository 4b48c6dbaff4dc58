//! The virtual machine's size, its memory on the host, its clock, and the limits of
//! the cgroup it is in there.

use std::fs;
use std::thread;
use std::time::{Duration, SystemTime};

use kuasar_runv_test_harness::{Container, SHORT, World, cgroup, json, process, wait_until};

use crate::victims::{self, Victim};

const MIB: u64 = 1 << 20;
/// For what moves a gibibyte in an emulated guest.
const LONG: Duration = Duration::from_secs(300);

/// A world whose machines may grow to this.
fn world(max_vcpus: u32, max_memory_mib: u32) -> World {
    let mut world = World::new();
    let path = world.path("config.toml");
    let config = fs::read_to_string(path).unwrap();
    world.configure(&format!(
        "{config}\n[vm]\nmax_vcpus = {max_vcpus}\nmax_memory_mib = {max_memory_mib}\n"
    ));
    world
}

/// CPUs and MiB that a container sees.
fn size(container: &Container<'_>) -> (u64, u64) {
    let out = container.exec_sh(
        &[],
        "echo cpus=$(nproc); while read name kib rest; do
            if [ $name = MemTotal: ]; then echo mib=$((kib / 1024)); fi
        done < /proc/meminfo",
    );
    let out = out.ok();
    let number = |key: &str| out.fact(key).parse().unwrap();
    (number("cpus"), number("mib"))
}

#[test]
fn the_machine_is_as_large_as_the_limits_ask_for_and_grows_with_them() {
    let world = world(2, 1600);
    let bundle = world.bundle().sh("echo up; sleep 1000").with(|c| {
        c["linux"]["resources"]["memory"] = json!({ "limit": 640 * MIB });
    });
    let container = world.start(&bundle, "c");
    container.wait_for_output("up");
    let (cpus, mib) = size(&container);
    assert_eq!(cpus, 1);
    // 640 and 128 for the guest, in steps of 128 from 512; the kernel keeps a part.
    assert!((700..=768).contains(&mib), "{mib}");

    let update = |args: &[&str]| container.command(&[&["update"], args].concat());
    let _ = update(&["--memory", "1000m", "--cpuset-cpus", "0-1"]).ok();
    let (cpus, mib) = size(&container);
    assert_eq!(cpus, 2);
    assert!((1080..=1152).contains(&mib), "{mib}");

    // What cannot be is refused and changes nothing.
    let _ = update(&["--memory", "1700m"]).fails_with(1, "max_memory_mib");
    let _ = update(&["--cpuset-cpus", "2"]).fails_with(1, "max_vcpus");
    assert_eq!(size(&container), (2, mib));

    // The cgroup that has the machine has room for it, on hosts whose memory is
    // controlled.
    let pid = i32::try_from(container.state()["pid"].as_i64().unwrap()).unwrap();
    let names = ["memory.limit_in_bytes", "memory.max"];
    if let Some(file) = cgroup::file(pid, "memory", names) {
        let limit: u64 = fs::read_to_string(file).unwrap().trim().parse().unwrap();
        assert_eq!(limit, (1152 + 512) * MIB);
    }
    if let Some(file) = cgroup::file(pid, "cpuset", ["cpuset.cpus", "cpuset.cpus"]) {
        assert_eq!(fs::read_to_string(file).unwrap().trim(), "0-1");
    }
}

#[test]
fn the_machine_grows_for_a_container_that_joins() {
    let world = world(1, 1600);
    let sandbox = world.bundle().sh("echo up; sleep 1000").annotations(&[
        ("io.kubernetes.cri.container-type", "sandbox"),
        ("io.kubernetes.cri.sandbox-id", &world.id("pod")),
    ]);
    let pod = world.start(&sandbox, "pod");
    pod.wait_for_output("up");
    let (_, before) = size(&pod);
    assert!(before <= 512, "{before}");
    let member = |mib: u64| {
        let annotations = [
            ("io.kubernetes.cri.container-type", "container"),
            ("io.kubernetes.cri.sandbox-id", &world.id("pod")),
        ];
        let bundle = world.bundle().sh("echo up; sleep 1000");
        bundle.annotations(&annotations).with(|c| {
            c["linux"]["resources"]["memory"] = json!({ "limit": mib * MIB });
        })
    };
    let first = world.start(&member(400), "first");
    first.wait_for_output("up");
    // 400 and 128 for the guest, in steps of 128 from 512; the kernel keeps a part.
    let (_, grown) = size(&first);
    assert!((600..=640).contains(&grown), "{grown}");
    let second = world.start(&member(500), "second");
    second.wait_for_output("up");
    let (_, grown) = size(&second);
    // 900 and 128 for the guest, in steps of 128.
    assert!((1080..=1152).contains(&grown), "{grown}");
    let _ = world
        .try_create(&member(800), "third")
        .fails_with(1, "the containers' memory limits come to 1700 MiB");
    for container in [&first, &second, &pod] {
        let _ = container.delete_force().ok();
    }
    world.assert_clean();
}

#[test]
fn memory_that_is_free_again_goes_back_to_the_host() {
    let world = world(1, 2048);
    let script = "dd if=/dev/zero of=/big/file bs=1M count=1024 2>/dev/null; echo full
        trap 'rm /big/file; echo empty' USR1
        while :; do sleep 0.1; done";
    let bundle = world.bundle().sh(script).with(|c| {
        c["linux"]["resources"]["memory"] = json!({ "limit": 1280 * MIB });
    });
    let bundle = bundle.mount(json!({
        "destination": "/big", "type": "tmpfs", "source": "tmpfs", "options": ["size=1100m"],
    }));
    let container = world.start(&bundle, "c");
    let vm = victims::the(&world, Victim::Vm);
    let shared_kib = || process::status_field(vm, "RssShmem").unwrap();
    let started = shared_kib();
    assert!(
        started < 512 << 10,
        "{started} KiB before anything was used"
    );
    wait_until("a full file", LONG, || container.stdout().contains("full"));
    let full = shared_kib();
    assert!(full > 1024 << 10, "{full} KiB");
    let _ = container.kill("USR1").ok();
    wait_until("an empty file", LONG, || {
        container.stdout().contains("empty")
    });
    wait_until("less memory of the host", LONG, || {
        shared_kib() < full - (900 << 10)
    });
}

/// How far the guest's clock is ahead of the host's, at least and at most, in seconds.
fn clock_offset(container: &Container<'_>) -> (f64, f64) {
    let now = || SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let (mut least, mut most) = (f64::MIN, f64::MAX);
    for _ in 0..5 {
        let before = now();
        let out = container.exec_sh(&[], "adjtimex").ok().stdout();
        let after = now();
        let field = |name: &str| -> f64 {
            let line = out.lines().find_map(|l| l.trim().strip_prefix(name));
            let number = line.and_then(|l| l.trim_start_matches(':').split_whitespace().next());
            number
                .unwrap_or_else(|| panic!("no {name} in {out}"))
                .parse()
                .unwrap()
        };
        let guest = field("time.tv_sec") + field("time.tv_usec") / 1e6;
        least = least.max(guest - after);
        most = most.min(guest - before);
    }
    (least, most)
}

#[track_caller]
fn clocks_agree(container: &Container<'_>) {
    let (least, most) = clock_offset(container);
    assert!(
        least < 0.010 && most > -0.010,
        "between {least} s and {most} s off"
    );
}

#[test]
fn the_clock_is_the_hosts_also_after_a_stop() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("echo up; sleep 1000"), "c");
    container.wait_for_output("up");
    clocks_agree(&container);
    let vm = victims::the(&world, Victim::Vm);
    process::signal(vm, libc::SIGSTOP).unwrap();
    thread::sleep(Duration::from_secs(5));
    process::signal(vm, libc::SIGCONT).unwrap();
    // The guest catches up first.
    let mut offset = (0.0, 0.0);
    wait_until("the right time", SHORT, || {
        offset = clock_offset(&container);
        offset.0 < 0.010 && offset.1 > -0.010
    });
}

/// What runs as the container's own process and is killed for lack of memory is
/// reported, whether anybody listens or not, and ends as it does with runc.
#[test]
fn a_process_without_memory_ends_by_sigkill_in_time() {
    let world = World::new();
    let bundle = world.bundle().probe("memory 200").with(|c| {
        c["linux"]["resources"]["memory"] = json!({ "limit": 48 * MIB });
    });
    let container = world.start(&bundle, "c");
    assert_eq!(container.exit_code(), 137);
    let _ = container.delete().ok();
    world.assert_clean();
}
