//! Real engines drive the runtime: the representative part of `integration/`.
//!
//! Each test runs one engine's script, which prints a line per case as it goes; a
//! case that runc fails as well on this machine is not counted.

// The lints keep panics out of the product; a test fails by panicking.
#![allow(clippy::expect_used)]

use std::path::Path;
use std::process::{Command, Stdio};

/// Runs `integration/ENGINE --representative`, one case at a time: the test
/// threads are what runs in parallel.
fn run(engine: &str) {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let runtime = std::env::var("RUNTIME").unwrap_or(env!("CARGO_BIN_EXE_kuasar-runv").into());
    let status = Command::new(top.join("integration").join(engine))
        .args(["--representative", "--jobs", "1", "--limit", "300"])
        .env("RUNTIME", runtime)
        .stdin(Stdio::null())
        .status()
        .expect("the script can be run");
    assert!(status.success(), "integration/{engine} ended with {status}");
}

#[test]
fn podman() {
    run("podman");
}

#[test]
fn containerd() {
    run("containerd");
}

#[test]
fn docker() {
    run("docker");
}

#[test]
fn buildah() {
    run("buildah");
}
