//! The container's terminal: libcontainer makes it inside the container and
//! sends its master over a unix socket.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use oci_spec::runtime::Process;

use super::Failure;
use crate::sys;

/// Where the master arrives.
pub struct ConsoleSocket {
    listener: UnixListener,
    pub path: PathBuf,
}

impl ConsoleSocket {
    pub fn new(dir: &Path) -> Result<ConsoleSocket, Failure> {
        let path = dir.join("console.sock");
        let listener =
            UnixListener::bind(&path).map_err(Failure::io("making the console socket"))?;
        Ok(ConsoleSocket { listener, path })
    }

    /// The master, which was sent before libcontainer returned.
    pub fn receive(self) -> Result<OwnedFd, Failure> {
        self.receive_master()
            .map_err(Failure::io("receiving the terminal"))
    }

    fn receive_master(self) -> io::Result<OwnedFd> {
        // Nothing to wait for: the connection was made before the container.
        self.listener.set_nonblocking(true)?;
        let (stream, _) = self.listener.accept()?;
        let mut name = [0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let mut iov = [IoSliceMut::new(&mut name)];
        let message = recvmsg::<()>(
            stream.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
        )?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                if let Some(&fd) = fds.first() {
                    // SAFETY: the kernel installed this descriptor for us.
                    return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        Err(io::Error::from(io::ErrorKind::UnexpectedEof))
    }
}

/// Gives the terminal its size, and its slave to the container's user (`uid` in
/// the guest), as runc does.
pub fn finish(master: &OwnedFd, process: &Process, uid: u32) -> Result<(), Failure> {
    if let Some(size) = process.console_size() {
        let cells = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
        set_size(master, cells(size.height()), cells(size.width()))
            .map_err(Failure::io("setting the terminal's size"))?;
    }
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags and returns a descriptor.
    let slave =
        sys::check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())
            .map_err(Failure::io("opening the terminal"))?;
    // SAFETY: just made for us; descriptors fit an int.
    let slave = unsafe { OwnedFd::from_raw_fd(slave as RawFd) };
    give_to(&slave, uid).map_err(Failure::io("giving the terminal to the user"))
}

/// Makes `uid` the owner, so that it can reopen `/dev/stdout` and its like.
pub fn give_to(fd: &OwnedFd, uid: u32) -> io::Result<()> {
    std::os::unix::fs::fchown(fd, Some(uid), None)
}

/// # Errors
/// `ENOTTY`.
pub fn set_size(master: &OwnedFd, rows: u16, cols: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads a winsize.
    sys::check(
        unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into(),
    )?;
    Ok(())
}
