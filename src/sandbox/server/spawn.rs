//! Starting a sandboxer: the part that runs in the command.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{CHANNEL_FD, COMMAND};
use crate::container::cgroup;
use crate::logging;
use crate::sandbox::LOG_FILE;
use crate::sys::process;

/// Starts a sandboxer that waits for its configuration on `channel`.
///
/// # Errors
/// As fork(2) and exec(2), or when it cannot be put into the cgroups.
pub fn spawn(channel: BorrowedFd<'_>, dir: &Path, cgroups: &[PathBuf]) -> io::Result<i32> {
    let log = logging::create_bounded(&dir.join(LOG_FILE))?;
    let channel = channel.as_raw_fd();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("kuasar-runv")
        .arg(COMMAND)
        .arg(dir.file_name().unwrap_or_default())
        .env_clear()
        // For the default of `--root`, where what is known of the machine is kept.
        .envs(crate::root::environment())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    // SAFETY: setsid, dup2 and close_range are async-signal-safe and allocate
    // nothing.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            if channel == CHANNEL_FD {
                nix::fcntl::fcntl(
                    channel,
                    nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
                )?;
            } else {
                nix::unistd::dup2(channel, CHANNEL_FD)?;
            }
            process::close_on_exec_from(CHANNEL_FD + 1)
        });
    }
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    cgroup::join(cgroups, pid)?;
    Ok(pid)
}
