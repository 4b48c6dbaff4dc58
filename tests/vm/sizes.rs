//! How large the parts may be: they are installed, mapped and booted by everybody.

use std::fs;
use std::path::Path;

use kuasar_runv_test_harness::{Flavour, Runtime, World};

const MIB: u64 = 1 << 20;

fn at_most(path: &Path, mebibytes: u64) {
    let size = fs::metadata(path)
        .unwrap_or_else(|e| panic!("{}: {e}; run `make image` first", path.display()))
        .len();
    assert!(
        size <= mebibytes * MIB,
        "{} has {:.1} MiB, at most {mebibytes} are allowed",
        path.display(),
        size as f64 / MIB as f64
    );
}

#[test]
fn the_host_binary_has_at_most_12_mib() {
    at_most(&Runtime::built().binary, 12);
}

#[test]
fn the_agent_has_at_most_8_mib() {
    // What is installed is the build of the profile of its own, beside the host's.
    let built = Runtime::built().binary;
    let target = built.ancestors().nth(2).expect("target/TARGET/PROFILE");
    at_most(&target.join("agent/kuasar-runv-agent"), 8);
}

#[test]
fn the_image_has_at_most_10_mib() {
    at_most(&Flavour::Source.artefact("initramfs.img"), 10);
}

/// There is one for every container, and it waits for hours: what its start needed is
/// given back.
#[test]
fn a_stand_in_has_a_small_heap() {
    let world = World::new();
    // A stream gets its buffer with its first byte.
    let container = world.start(&world.bundle().sh("sleep 1000"), "c");
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", container.pid)).unwrap();
    let heap = smaps.split("[heap]").nth(1).expect("a heap");
    let dirty = heap
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"));
    let kib: u64 = dirty
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    assert!(kib <= 24, "{kib} KiB");
}
