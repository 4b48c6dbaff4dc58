//! The last of the tests: nothing of any test before is left on the machine.
//!
//! Every test checks its own world. This one looks again for what may have appeared
//! later, or escaped by having no name of a world: cargo runs test targets in
//! alphabetical order.

// The lints keep panics out of the product; a test fails by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;

use kuasar_runv_test_harness::process::Process;
use kuasar_runv_test_harness::{Runtime, leaks, process};

#[test]
fn no_process_is_left() {
    let ours = Runtime::built().binary;
    let mut left: Vec<_> = leaks::processes(&leaks::prefix());
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
    let left: Vec<_> = left.iter().map(Process::describe).collect();
    assert!(left.is_empty(), "{}", left.join("\n"));
}

#[test]
fn no_mount_is_left() {
    let left = leaks::mounts(&leaks::prefix());
    assert!(left.is_empty(), "{}", left.join("\n"));
}

#[test]
fn no_cgroup_is_left() {
    let left = leaks::cgroups(&leaks::prefix());
    assert!(left.is_empty(), "{left:?}");
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
        .filter(|e| {
            let name = e.file_name().to_string_lossy().into_owned();
            name.contains("runv") || name.contains(&leaks::prefix())
        })
        .collect();
    assert!(ours.is_empty(), "{ours:?}");
}

#[test]
fn no_file_is_left() {
    let left: Vec<_> = fs::read_dir(std::env::temp_dir())
        .unwrap()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(&leaks::prefix()))
        .collect();
    assert!(left.is_empty(), "{}", left.join("\n"));
}
