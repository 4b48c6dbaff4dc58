//! `kuasar-runv`: an OCI runtime with runc's command line that runs every pod
//! in its own virtual machine. `docs/architecture.md` explains the parts.
//!
//! A library only so that fuzz targets reach what reads the guest's words
//! ([`fuzzing`]); the binary is [`run`].

use std::process::ExitCode;

mod agent_client;
mod check;
mod cmd;
mod config;
mod container;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod logging;
mod root;
mod sandbox;
mod standin;
mod sys;
mod vm;

/// The whole program: the command line's, or one of its resident processes.
#[must_use]
pub fn run() -> ExitCode {
    // The resident processes are this binary too. They come first, so that the
    // stand-in touches as few of its pages as possible.
    let code = match std::env::args_os().nth(1) {
        Some(name) if name == standin::COMMAND => standin::main(),
        Some(name) if name == sandbox::server::COMMAND => sandbox::server::main(),
        Some(name) if name == sandbox::host_oom::victim::COMMAND => {
            sandbox::host_oom::victim::main()
        }
        _ => cmd::run(),
    };
    ExitCode::from(code)
}
