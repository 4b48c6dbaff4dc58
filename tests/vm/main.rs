//! What only a runtime with virtual machines has: a guest, a hypervisor and a
//! sandboxer that can die, two kernels, a configuration. `tests/oci` has the rest.

// The lints keep panics out of the product; a test fails by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cni;
mod comforts;
mod concurrency;
mod config_file;
mod confinement;
mod disks;
mod exec;
mod exits;
mod faults;
mod faults_in_between;
mod flavours;
mod guest;
mod lack_of_memory;
mod limits;
mod loopback;
mod machine_options;
mod network;
mod pods;
mod pods_end;
mod resources;
mod served;
mod served_cards;
mod sizes;
mod switch;
mod templates;
mod terminal;
mod unsupported;
mod victims;
mod volumes;

mod probe {
    #[test]
    #[ignore = "runs inside the containers of other tests"]
    fn main() {
        kuasar_runv_test_harness::probe::main();
    }
}
