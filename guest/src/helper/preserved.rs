//! The descriptors a process gets besides stdio: at the numbers from
//! [`FIRST_PRESERVED`] on.
//!
//! They are put there before anything else is done, in the helper itself, from which
//! the process inherits them: later on the process may have a seccomp filter that
//! forbids it, or have something of its own at these numbers.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use kuasar_runv_protocol::stream::{FIRST_PRESERVED, MAX_PRESERVED};

use crate::sys;

/// The first number behind them.
pub fn end(preserved: u8) -> RawFd {
    FIRST_PRESERVED + RawFd::from(preserved)
}

/// Takes the last `preserved` of the descriptors and puts them where the process gets
/// them, for good. Returns the others, moved out of their way; whatever else this
/// process has at those numbers is closed.
///
/// # Errors
/// `InvalidData` when there are fewer or too many; `EMFILE`.
pub fn place(preserved: u8, mut fds: Vec<OwnedFd>) -> io::Result<Vec<OwnedFd>> {
    let others = fds.len().checked_sub(usize::from(preserved));
    let (Some(others), true) = (others, preserved <= MAX_PRESERVED) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not as many preserved descriptors as announced",
        ));
    };
    let end = end(preserved);
    let above = |fds: Vec<OwnedFd>| -> io::Result<Vec<OwnedFd>> {
        fds.into_iter().map(|fd| sys::move_above(fd, end)).collect()
    };
    let moved = above(fds.split_off(others))?;
    let others = above(fds)?;
    for (fd, number) in moved.iter().zip(FIRST_PRESERVED..) {
        sys::dup2(fd, number)?;
    }
    Ok(others)
}
