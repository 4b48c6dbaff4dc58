//! `update`: limits change while the container runs.

use std::fs;

use kuasar_runv_test_harness::{Bundle, Container, SHORT, World, json, wait_until};

/// Prints limits of its own cgroup, of cgroup v2 or of v1, when it gets SIGUSR1.
const SHOWS: &str =
    "show() { echo $1=$(cat /sys/fs/cgroup/$2 2>/dev/null || cat /sys/fs/cgroup/$3); }
    all() {
        show memory memory.max memory/memory.limit_in_bytes
        show low memory.low memory/memory.soft_limit_in_bytes
        show pids pids.max pids/pids.max
        show quota cpu.max cpu/cpu.cfs_quota_us
        show shares cpu.weight cpu/cpu.shares
        show cpus cpuset.cpus cpuset/cpuset.cpus
        echo done=$1
    }
    n=0
    trap 'n=$((n + 1)); all $n' USR1
    echo ready
    while :; do sleep 0.05; done";

struct Limited<'w> {
    container: Container<'w>,
    shown: std::cell::Cell<u32>,
}

impl<'w> Limited<'w> {
    fn start(world: &'w World) -> Limited<'w> {
        let container = world.start(&bundle(world), "c");
        container.wait_for_output("ready");
        let shown = std::cell::Cell::new(0);
        Limited { container, shown }
    }

    #[track_caller]
    fn update(&self, args: &[&str]) {
        let _ = self.container.command(&[&["update"], args].concat()).ok();
    }

    /// The limits as the container sees them now.
    #[track_caller]
    fn shows(&self, key: &str) -> String {
        self.shown.set(self.shown.get() + 1);
        let end = format!("done={}\n", self.shown.get());
        let _ = self.container.kill("USR1").ok();
        self.container.wait_for_output(&end);
        let stdout = self.container.stdout();
        let last = stdout.lines().rev();
        let value = last.filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        value.map(str::to_owned).next().expect("a limit")
    }

    #[track_caller]
    fn is(&self, key: &str, expected: &[&str]) {
        let shown = self.shows(key);
        assert!(expected.contains(&shown.as_str()), "{key} is {shown:?}");
    }
}

fn bundle(world: &World) -> Bundle {
    world.bundle().sh(SHOWS).with(|c| {
        let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "cgroup" }));
        c["linux"]["resources"]["memory"] = json!({ "limit": 64 << 20 });
        c["linux"]["resources"]["pids"] = json!({ "limit": 30 });
        c["linux"]["resources"]["cpu"] = json!({ "quota": 40000, "period": 50000 });
    })
}

#[test]
fn each_flag_changes_its_limit_and_leaves_the_others() {
    let world = World::new();
    let limited = Limited::start(&world);
    limited.is("memory", &["67108864"]);
    limited.update(&["--pids-limit", "40"]);
    limited.is("pids", &["40"]);
    limited.is("memory", &["67108864"]);
    limited.update(&["--memory", "96m", "--memory-reservation", "16MiB"]);
    limited.is("memory", &["100663296"]);
    limited.is("low", &["16777216"]);
    limited.is("pids", &["40"]);
    // The period is that of config.json.
    limited.update(&["--cpu-quota", "30000"]);
    limited.is("quota", &["30000 50000", "30000"]);
    limited.update(&["--cpu-share", "512", "--cpuset-cpus", "0"]);
    limited.is("shares", &["20", "59", "512"]);
    limited.is("cpus", &["0"]);
    limited.update(&["--cpu-quota", "-1", "--pids-limit", "-1"]);
    limited.is("quota", &["max 50000", "-1"]);
    limited.is("pids", &["max"]);
    limited.update(&["--memory", "-1"]);
    limited.is("memory", &["max", "9223372036854771712"]);
    // Nothing to do is no mistake.
    limited.update(&[]);
}

/// podman gives a file, containerd's shim a pipe.
#[test]
fn limits_come_from_a_file_or_from_standard_input() {
    let world = World::new();
    let limited = Limited::start(&world);
    let file = world.path("resources.json");
    // What the user did not mention is empty, null or 0.
    fs::write(
        &file,
        r#"{"memory": {"limit": 83886080}, "cpu": {"cpus": "", "mems": ""}, "pids": {"limit": 0}}"#,
    )
    .unwrap();
    let flag = format!("--resources={}", file.display());
    // The other options are ignored then.
    limited.update(&[&flag, "--pids-limit", "11"]);
    limited.is("memory", &["83886080"]);
    limited.is("pids", &["30"]);

    let id = &limited.container.id;
    let call = world.call(["update", "--resources", "-", id]);
    let json = r#"{"cpu": {"shares": 2, "quota": 20000, "period": 100000}, "pids": {"limit": 25}}"#;
    let _ = call.stdin_bytes(json).output().ok();
    limited.is("quota", &["20000 100000", "20000"]);
    limited.is("shares", &["1", "2"]);
    limited.is("pids", &["25"]);

    // The writer may keep the pipe open: one JSON value is one JSON value.
    let call = world.call(["update", "-r", "-", id]).stdin_pipe();
    let mut running = call.spawn();
    let mut stdin = running.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, br#"{"pids": {"limit": 26}}"#).unwrap();
    std::io::Write::write_all(&mut stdin, b"\n").unwrap();
    wait_until("new limit", SHORT, || limited.shows("pids") == "26");
    drop(stdin);
    let _ = running.wait().ok();
}

#[test]
fn what_is_wrong_changes_nothing() {
    let world = World::new();
    let limited = Limited::start(&world);
    let refused = |args: &[&str], words: &str| {
        let out = limited.container.command(&[&["update"], args].concat());
        let _ = out.fails_about(1, words);
    };
    refused(&["--cpu-share", "many"], "cpu-share");
    refused(&["--memory", "lots"], "memory");
    refused(&["--resources", "/no/such/file"], "/no/such/file");
    refused(&["--l3-cache-schema", "L3:0=f"], "Intel RDT/CAT");
    refused(&["--mem-bw-schema", "MB:0=20"], "Intel RDT/MBA");
    // Of several limits the last is impossible.
    let call = world.call(["update", "-r", "-", &limited.container.id]);
    let json = r#"{"pids": {"limit": 20}, "cpu": {"cpus": "4095"}}"#;
    assert_eq!(call.stdin_bytes(json).output().code(), 1);
    let call = world.call(["update", "-r", "-", &limited.container.id]);
    assert_eq!(call.stdin_bytes("{").output().code(), 1);
    limited.is("pids", &["30"]);
    limited.is("memory", &["67108864"]);
}

#[test]
fn a_created_or_paused_container_is_updated_and_a_stopped_one_is_not() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("exit 0"), "c");
    let _ = container.command(&["update", "--pids-limit", "20"]).ok();
    let _ = container.command(&["pause"]).ok();
    let _ = container.command(&["update", "--pids-limit", "21"]).ok();
    assert_eq!(container.status(), "paused");
    let _ = container.command(&["resume"]).ok();
    container.start();
    assert_eq!(container.exit_code(), 0);
    container.wait_for_status("stopped");
    let _ = container
        .command(&["update", "--pids-limit", "22"])
        .fails_with(1, "container not running");
    let _ = world
        .call(["update", "--pids-limit", "22", &world.id("unknown")])
        .output()
        .fails_with(1, "container does not exist");
}
