//! `/init` of the virtual machine.
//!
//! Everything is in the library, so that it can be tested without a machine.

use std::process::ExitCode;

fn main() -> ExitCode {
    kuasar_runv_agent::init();
    // PID 1 must not return: the kernel panics, and the host sees the machine
    // end, which is what is left to do when even powering off failed.
    ExitCode::FAILURE
}
