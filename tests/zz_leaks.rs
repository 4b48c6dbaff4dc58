//! The last of the tests: nothing of any test before is left on the machine.
//!
//! Every test checks its own world. This one looks again for what may have appeared
//! later, or escaped by having no name of a world: cargo runs test targets in
//! alphabetical order. Worlds of another test run that is still going on are its own.

// The lints keep panics out of the product; a test fails by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;

use kuasar_runv_test_harness::process::Process;
use kuasar_runv_test_harness::{Runtime, leaks, process};

/// Whether this text names a world whose test process is still running.
fn is_in_use(text: &str) -> bool {
    let Some((_, rest)) = text.split_once(leaks::PREFIX) else {
        return false;
    };
    let pid = rest.split('-').next().and_then(|pid| pid.parse().ok());
    pid.is_some_and(process::is_alive)
}

/// What is left, without what another run still uses.
fn left(found: impl IntoIterator<Item = String>) -> Vec<String> {
    found.into_iter().filter(|text| !is_in_use(text)).collect()
}

#[test]
fn no_process_is_left() {
    let ours = Runtime::built().binary;
    let mut left: Vec<_> = leaks::processes(leaks::PREFIX);
    let by_program = process::all_pids().into_iter().filter(|pid| {
        fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| {
            exe.to_string_lossy().trim_end_matches(" (deleted)") == ours.to_string_lossy()
        })
    });
    left.extend(
        by_program
            .filter_map(Process::read)
            .filter(Process::is_alive),
    );
    let left = self::left(left.iter().map(Process::describe));
    assert!(left.is_empty(), "{}", left.join("\n"));
}

#[test]
fn no_mount_is_left() {
    let left = left(leaks::mounts(leaks::PREFIX));
    assert!(left.is_empty(), "{}", left.join("\n"));
}

#[test]
fn no_cgroup_is_left() {
    let cgroups = leaks::cgroups(leaks::PREFIX);
    let left = left(cgroups.iter().map(|c| c.display().to_string()));
    assert!(left.is_empty(), "{}", left.join("\n"));
}

#[test]
fn no_network_device_or_namespace_is_left() {
    let devices: Vec<_> = leaks::interfaces()
        .into_iter()
        .filter(|name| name.starts_with("tap") || name.contains("runv"))
        .collect();
    assert!(devices.is_empty(), "{devices:?}");
    let named: Vec<_> = fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
        .collect();
    let ours: Vec<_> = named
        .iter()
        .filter(|e| e.file_name().to_string_lossy().contains("runv"))
        .collect();
    assert!(ours.is_empty(), "{ours:?}");
}

#[test]
fn no_file_is_left() {
    let worlds = fs::read_dir(std::env::temp_dir())
        .unwrap()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(leaks::PREFIX));
    let left = left(worlds);
    assert!(left.is_empty(), "{}", left.join("\n"));
}
