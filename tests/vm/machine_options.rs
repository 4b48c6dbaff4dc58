//! What the machine is made of when the configuration asks for it: its console, and
//! huge pages of the host.

use std::fs;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use kuasar_runv_test_harness::world::configuration;
use kuasar_runv_test_harness::{Flavour, SHORT, World, wait_until};
use serde_json::json;

/// A world with more lines for the tables `[vm]` and `[guest]`.
fn world_with(vm: &str, guest: &str) -> World {
    let mut world = World::new();
    // The table of the guest is the last.
    let toml = format!("{}{guest}\n[vm]\n{vm}\n", configuration(Flavour::Source));
    world.configure(&toml);
    world
}

fn console_log(world: &World, name: &str) -> String {
    let sandbox = world.root.join("sandboxes").join(world.id(name));
    fs::read_to_string(sandbox.join("console.log")).unwrap_or_default()
}

/// A kernel that finds no init panics.
#[test]
fn last_words_of_a_kernel_are_in_the_error_with_either_console() {
    for console in ["serial", "virtio"] {
        let vm = format!("console = {console:?}");
        let guest = "kernel_params = \"rdinit=/none\"";
        let world = world_with(&vm, guest);
        let out = world.try_create(&world.bundle().sh("exit 0"), "c");
        let out = out.fails_with(1, "Kernel panic - not syncing");
        drop(out);
        world.assert_clean();
    }
}

#[test]
fn a_virtio_console_is_the_guests_console() {
    let mut world = World::new();
    let toml = configuration(Flavour::Source);
    world.configure(&format!(
        "debug = true\n{toml}\n[vm]\nconsole = \"virtio\"\n"
    ));
    let script = "cat /proc/consoles; echo up; sleep 1000";
    let container = world.start(&world.bundle().sh(script), "c");
    container.wait_for_output("up\n");
    let consoles = container.stdout();
    assert!(
        consoles.contains("hvc0") && !consoles.contains("ttyS0"),
        "{consoles}"
    );
    // It begins with what was printed when the driver was there.
    wait_until("the log has what the kernel prints", SHORT, || {
        console_log(&world, "c").contains("] ")
    });
    let _ = container.delete_force().ok();
}

/// Each record is about 900 bytes. An open file of `/dev/kmsg` takes ten of them in five
/// seconds (kernel/printk/printk.c), so each has its own.
const FLOOD: &str = "mknod /tmp/k c 1 11
    fill=$(head -c 880 /dev/zero | tr '\\0' x)
    n=0; while [ $n -lt 800 ]; do echo \"<3>flood $n $fill\" >/tmp/k; n=$((n + 1)); done
    echo done; sleep 1000";

#[test]
fn a_guest_that_writes_to_its_log_without_end_has_two_files_and_the_newest_is_in_them() {
    const LIMIT: u64 = 256 * 1024;
    let world = World::new();
    let kmsg = json!([
        { "allow": false, "access": "rwm" },
        { "allow": true, "type": "c", "major": 1, "minor": 11, "access": "w" },
    ]);
    let bundle = world
        .bundle()
        .sh(FLOOD)
        .capabilities(&["CAP_MKNOD"])
        .with(|c| c["linux"]["resources"]["devices"] = kmsg);
    let container = world.start(&bundle, "c");
    container.wait_for_output("done\n");
    // The agent complains of who connects to its port for streams and says nothing.
    let sandbox = world.root.join("sandboxes").join(world.id("c"));
    let mut agent = UnixStream::connect(sandbox.join("vsock.sock")).expect("a socket");
    writeln!(agent, "CONNECT 1026").expect("the device reads");
    agent.shutdown(Shutdown::Write).expect("a connection");
    wait_until("the newest is in the log", SHORT, || {
        let log = console_log(&world, "c");
        log.rsplit_once("flood 799 ")
            .is_some_and(|(_, after)| after.contains("kuasar-agent: stream without"))
    });
    let mut logs: Vec<_> = fs::read_dir(&sandbox)
        .expect("the sandbox's directory")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("text")
        })
        .filter(|name| name.starts_with("console.log"))
        .collect();
    logs.sort();
    assert_eq!(logs, ["console.log", "console.log.1"]);
    let [new, old] = [0, 1].map(|n| fs::read(sandbox.join(&logs[n])).expect("a log"));
    assert!(new.len() as u64 <= LIMIT, "{} bytes", new.len());
    let old_len = old.len() as u64;
    assert!((LIMIT / 2..=LIMIT).contains(&old_len), "{old_len} bytes");
    // One goes on where the other ends, with nothing lost in between.
    let text = String::from_utf8_lossy(&[old, new].concat()).into_owned();
    let numbers: Vec<u32> = text
        .match_indices("flood ")
        .filter_map(|(at, word)| text[at + word.len()..].split_once(" x")?.0.parse().ok())
        .collect();
    let first = numbers.first().copied().expect("some of it");
    assert!(first > 0, "all of it is there");
    assert_eq!(numbers, (first..800).collect::<Vec<_>>());
    let _ = container.delete_force().ok();
}

#[test]
fn a_machine_without_a_console_prints_nothing() {
    let world = world_with("console = \"none\"", "");
    let container = world.start(
        &world.bundle().sh("cat /proc/consoles; echo up; sleep 1000"),
        "c",
    );
    container.wait_for_output("up\n");
    assert_eq!(container.stdout(), "up\n");
    assert_eq!(console_log(&world, "c"), "");
    let _ = container.delete_force().ok();
}

/// What the host has of huge pages of 2 MiB: all, free.
fn pool() -> (u64, u64) {
    let read = |name: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        let text = fs::read_to_string(path).expect("huge pages of 2 MiB");
        text.trim().parse().expect("a number")
    };
    (read("nr_hugepages"), read("free_hugepages"))
}

fn set_pool(pages: u64) {
    fs::write("/proc/sys/vm/nr_hugepages", pages.to_string()).expect("root");
}

#[test]
fn huge_pages_are_taken_for_the_life_of_the_machine() {
    const MIB: u64 = 256;
    let (before, free) = pool();
    let vm = format!("memory_mib = {MIB}\nmax_memory_mib = {MIB}\nhugepages = \"2M\"");
    let world = world_with(&vm, "");
    // One page is missing, unless there is more than enough.
    set_pool(before - free + MIB / 2 - 1);
    let words = "128 huge pages of 2048 KiB, and 127 are free: raise";
    let out = world.try_create(&world.bundle().sh("exit 0"), "few");
    let _ = out.fails_with(1, words);
    world.assert_clean();

    set_pool(before - free + MIB / 2);
    let (_, free) = pool();
    assert_eq!(free, MIB / 2, "the host has that much memory in one piece");
    let container = world.start(&world.bundle().sh("echo up; sleep 1000"), "c");
    container.wait_for_output("up\n");
    assert_eq!(pool().1, 0);
    let _ = container.delete_force().ok();
    wait_until("the pages are free again", SHORT, || pool().1 == MIB / 2);
    set_pool(before);
}
