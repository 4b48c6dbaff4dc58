//! `/init` of the virtual machine.
//!
//! Everything is in the library, so that it can be tested without a machine.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Anywhere else it would mount its file systems over those of the machine it is on, and
    // in the end power that off.
    if std::process::id() != 1 {
        eprintln!(
            "kuasar-runv-agent is the init of kuasar-runv's virtual machines and does nothing else"
        );
        return ExitCode::from(2);
    }
    kuasar_runv_agent::init();
    // PID 1 must not return: the kernel panics, and the host sees the machine
    // end, which is what is left to do when even powering off failed.
    ExitCode::FAILURE
}
