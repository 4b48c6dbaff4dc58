//! The debug console: a shell of the image on a port of its own.
//!
//! Only served when the kernel command line asks for it, and of use only with an
//! image that has a shell.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use kuasar_runv_protocol::DEBUG_CONSOLE_PORT;
use tokio::sync::watch;

use crate::boot::IMAGE_DIR;
use crate::streams::{Connection, relay_terminal_input, relay_terminal_output};
use crate::sys;
use crate::transport::Transport;

const SHELLS: &[&str] = &["bin/sh", "bin/bash", "bin/busybox"];
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves shells, one per connection.
///
/// # Errors
/// `NotFound` without a shell; of listening.
pub fn serve(transport: &Transport) -> io::Result<()> {
    let shell = SHELLS
        .iter()
        .map(|shell| Path::new(IMAGE_DIR).join(shell))
        .find(|shell| shell.exists())
        .ok_or(io::ErrorKind::NotFound)?;
    let listener = transport.listen(DEBUG_CONSOLE_PORT)?;
    sys::spawn(async move {
        loop {
            let served = match listener.accept().await.and_then(Connection::new) {
                Ok(connection) => attach_shell(&shell, connection),
                Err(e) => Err(e),
            };
            if let Err(e) = served {
                log::warn!("debug console: {e}");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    });
    Ok(())
}

fn attach_shell(shell: &Path, connection: Connection) -> io::Result<()> {
    let pty = nix::pty::openpty(None, None)?;
    spawn_shell(shell, &pty.slave)?;
    drop(pty.slave);
    let terminal = Connection::new(pty.master)?;
    sys::spawn(async move {
        // The shell's end shows as the end of the terminal; nothing else ends
        // these relays. The sender lives as long as they do.
        let (_keep, exit) = watch::channel(None);
        tokio::select! {
            () = relay_terminal_output(terminal.clone(), connection.clone(), exit.clone()) => {}
            // Closing the terminal hangs the shell up.
            () = relay_terminal_input(connection, terminal, exit) => {}
        }
    });
    Ok(())
}

/// The reaper reaps it.
fn spawn_shell(shell: &Path, slave: &OwnedFd) -> io::Result<()> {
    let stdio = || slave.try_clone().map(Stdio::from);
    let mut command = Command::new(shell);
    if shell.ends_with("busybox") {
        command.arg("sh");
    }
    command
        .env_clear()
        .env("PATH", format!("{IMAGE_DIR}/bin:{IMAGE_DIR}/sbin"))
        .env("TERM", "linux")
        .env("HOME", "/")
        .stdin(stdio()?)
        .stdout(stdio()?)
        .stderr(stdio()?);
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            sys::check(libc::ioctl(0, libc::TIOCSCTTY, 0).into())?;
            Ok(())
        })
    };
    drop(command.spawn()?);
    Ok(())
}
