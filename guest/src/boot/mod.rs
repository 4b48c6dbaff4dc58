//! From what the kernel hands to PID 1 to a system that can run containers.
//!
//! The kernel starts `/init` in the initial rootfs with nothing mounted.
//! pivot_root(2) refuses that filesystem, so the agent moves to a tmpfs of its
//! own first; containers can then be pivoted in the ordinary way. The agent's
//! executable stays behind in the rootfs: nothing is copied.

mod cmdline;
mod modules;
mod mounts;

use std::io;
use std::path::Path;

pub use cmdline::Config;
pub use mounts::{IMAGE_DIR, mount_share};

use crate::cgroup;

/// Open files the agent may have: a container takes about ten.
const AGENT_NOFILE: u64 = 65_536;
/// What containers may raise theirs to; docker's default.
pub const MAX_NOFILE: u64 = 1_048_576;
/// What containers start with unless their spec says something else; the
/// kernel's default.
pub const CONTAINER_NOFILE: u64 = 1024;

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("loading module {name}: {source}")]
    Module { name: String, source: io::Error },
    #[error("mounting {target}: {source}")]
    Mount { target: String, source: io::Error },
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        source: io::Error,
    },
}

impl BootError {
    fn io<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> BootError {
        move |source| BootError::Io {
            what,
            source: source.into(),
        }
    }
}

/// Everything between the kernel and what is a pod's: after this, its shared directory
/// is to be mounted.
///
/// # Errors
/// The first step that failed; the machine is of no use then.
pub fn prepare() -> Result<Config, BootError> {
    modules::load()?;
    let config = mounts::move_to_own_root()?;
    cgroup::enable_controllers().map_err(BootError::io("enabling cgroup controllers"))?;
    raise_limits().map_err(BootError::io("raising limits"))?;
    Ok(config)
}

/// What the kernel's command line says, when everything else has been prepared.
///
/// # Errors
/// Of reading it.
pub fn config() -> Result<Config, BootError> {
    cmdline::read(Path::new("/proc/cmdline"))
        .map_err(BootError::io("reading the kernel command line"))
}

/// Limits of this process, from which containers' are derived.
fn raise_limits() -> io::Result<()> {
    for (resource, soft, hard) in [
        (libc::RLIMIT_NOFILE, AGENT_NOFILE, MAX_NOFILE),
        (libc::RLIMIT_NPROC, libc::RLIM_INFINITY, libc::RLIM_INFINITY),
        (libc::RLIMIT_CORE, 0, libc::RLIM_INFINITY),
        (libc::RLIMIT_MEMLOCK, 8 << 20, libc::RLIM_INFINITY),
    ] {
        let limit = libc::rlimit {
            rlim_cur: soft,
            rlim_max: hard,
        };
        // SAFETY: the struct is valid for the call.
        crate::sys::check(unsafe { libc::setrlimit(resource, &raw const limit) }.into())?;
    }
    Ok(())
}
