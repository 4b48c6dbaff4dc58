//! What every OCI runtime with runc's command line does, one file per command and
//! per topic. `RUNTIME=/usr/sbin/runc cargo test --release --test oci` checks the
//! expectations themselves.

// The lints keep panics out of the product; a test fails by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bad_input;
mod cgroups;
mod checkpoint;
mod config_spec;
mod create;
mod delete;
mod devices;
mod events;
mod exec;
mod exec_process;
mod exec_tty;
mod features;
mod hooks;
mod host_sockets;
mod hostile_image;
mod kill;
mod lack_of_memory;
mod list;
mod log;
mod loopback;
mod mount_options;
mod mounts;
mod namespaces;
mod network;
mod parallel;
mod pause;
mod preserve_fds;
mod process;
mod ps;
mod resources;
mod rootfs;
mod run;
mod seccomp;
mod signals;
mod spec;
mod standin;
mod start;
mod state;
mod stdio;
mod terminal;
mod tty;
mod update;
mod userns;
mod volumes;

mod probe {
    #[test]
    #[ignore = "runs inside the containers of other tests"]
    fn main() {
        kuasar_runv_test_harness::probe::main();
    }
}
