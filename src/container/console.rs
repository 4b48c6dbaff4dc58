//! The container's terminal on the host: a pty whose master goes to the caller
//! over the console socket, and whose slave is the stand-in's stdio.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::pty::{Winsize, openpty};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// A new pty.
pub struct Console {
    master: OwnedFd,
}

impl Console {
    /// The console and the slave side, of the given size (`process.consoleSize`).
    ///
    /// # Errors
    /// As openpty(3).
    pub fn open(size: Option<Winsize>) -> io::Result<(Console, OwnedFd)> {
        let pty = openpty(size.as_ref(), None)?;
        for fd in [&pty.master, &pty.slave] {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?;
        }
        let console = Console { master: pty.master };
        Ok((console, pty.slave))
    }

    /// Sends the master to whoever listens on `socket` (docs/terminals.md of
    /// runc: one message, the descriptor with SCM_RIGHTS, a name as payload).
    ///
    /// # Errors
    /// As connect(2) and sendmsg(2).
    pub fn send(self, socket: &Path) -> io::Result<()> {
        let stream = UnixStream::connect(socket)?;
        let fds = [self.master.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let name = [io::IoSlice::new(b"/dev/ptmx")];
        sendmsg(&stream, &name, &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}
