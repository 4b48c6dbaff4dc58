//! What a stand-in does for a terminal besides moving its bytes.
//!
//! The terminal on its side is either the slave of a pty whose master an engine
//! holds, or the caller's own. It only passes bytes; its size, and that it hung
//! up, are told to the guest's terminal.

use std::os::fd::{AsFd, BorrowedFd};

use kuasar_runv_protocol::stream::Frame;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// The host's end of a terminal.
pub struct Terminal {
    /// `None` when the caller has redirected all three streams.
    fd: Option<BorrowedFd<'static>>,
    /// Its mode before the caller sets it to raw mode.
    before: Option<Termios>,
    hung_up: bool,
}

impl Terminal {
    /// The first of the standard streams that is a terminal.
    pub fn new() -> Terminal {
        let streams = [
            rustix::stdio::stdin(),
            rustix::stdio::stdout(),
            rustix::stdio::stderr(),
        ];
        let fd = streams.into_iter().find(|fd| isatty(fd));
        Terminal {
            before: fd.and_then(|fd| tcgetattr(fd).ok()),
            fd,
            hung_up: false,
        }
    }

    /// Its size. A terminal that nobody has given one yet says nothing about it.
    pub fn size(&self) -> Option<Frame> {
        let size = tcgetwinsize(self.fd?).ok()?;
        ((size.ws_row, size.ws_col) != (0, 0)).then_some(Frame::WindowSize {
            rows: size.ws_row,
            cols: size.ws_col,
        })
    }

    /// Whether nobody is at the other end any more.
    pub fn is_hung_up(&self) -> bool {
        let Some(fd) = &self.fd else { return false };
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::empty())];
        let now = Timespec::default();
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
    }

    /// Notes that the guest's terminal is being hung up; false if it was before.
    pub fn first_hang_up(&mut self) -> bool {
        !std::mem::replace(&mut self.hung_up, true)
    }

    /// Sets the mode back that the terminal had before the caller changed it.
    pub fn restore(&self) {
        if let (Some(fd), Some(before)) = (self.fd, &self.before) {
            // A terminal that is gone needs no mode.
            let _ = tcsetattr(fd, OptionalActions::Now, before);
        }
    }
}
