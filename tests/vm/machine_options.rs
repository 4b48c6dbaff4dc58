//! What the machine is made of when the configuration asks for it: its console, and
//! huge pages of the host.

use std::fs;

use kuasar_runv_test_harness::world::configuration;
use kuasar_runv_test_harness::{Flavour, SHORT, World, wait_until};

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
