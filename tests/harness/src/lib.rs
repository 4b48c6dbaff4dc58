//! What every integration test needs: a world of its own, bundles, containers,
//! commands with deadlines, and a check that nothing is left behind.
//!
//! ```text
//!  test ── World ──── /tmp/krt-<run>-<pid>-<n>x/   root, bundles, output files
//!            │
//!            ├─ Bundle      rootfs of busybox links + config.json built as JSON
//!            ├─ Invocation  one call of the runtime under test, never longer than its deadline
//!            └─ Container   create/start/kill/state/delete, wait for the pid of the pid file
//! ```
//!
//! The test process is a **child subreaper**, as conmon and containerd's shim are:
//! the process in the pid file becomes its child, and its exit status is the
//! container's. One thread ([`reaper`]) collects every child, so nothing else in a
//! test may wait for a process itself.
//!
//! The name of a world (`krt-<run>-<pid>-<n>x`) is in the path of everything a test
//! makes, in every container id, and in the environment of every call. Whatever
//! carries it after the test is a leak ([`leaks`]): dropping the world deletes its
//! containers, looks for processes, mounts, cgroups and files, and fails the test
//! when it finds one.
//!
//! `RUNTIME` picks another runtime (`RUNTIME=/usr/sbin/runc`), so that the tests
//! themselves are tested against the runtime whose behaviour they describe.

// The lints keep panics out of the product; a test fails by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::exit)]

pub mod bundle;
pub mod cgroup;
pub mod container;
pub mod data;
pub mod invocation;
pub mod leaks;
pub mod listener;
pub mod network;
pub mod probe;
pub mod process;
pub mod reaper;
pub mod runc;
pub mod runtime;
pub mod screen;
pub mod wait;
pub mod world;

pub use bundle::Bundle;
pub use container::Container;
pub use invocation::{Invocation, Output, Running};
pub use network::Netns;
pub use runtime::{Flavour, Runtime};
pub use screen::Screen;
pub use wait::{CALL, SHORT, wait_until};
pub use world::World;

pub use serde_json::{Value, json};
