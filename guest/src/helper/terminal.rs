//! The container's terminal: libcontainer makes it inside the container and
//! sends its master over a socket.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::sys::termios::{OutputFlags, SetArg, tcgetattr, tcsetattr};
use oci_spec::runtime::Process;

use super::Failure;
use crate::{ipc, sys};

/// Where the master arrives: a connected pair of sockets.
pub struct ConsoleSocket {
    ours: OwnedFd,
    /// Kept open by this process until the end; the container's closes it.
    theirs: OwnedFd,
}

impl ConsoleSocket {
    pub fn new() -> Result<ConsoleSocket, Failure> {
        let (ours, theirs) = ipc::pair().map_err(Failure::io("making the console socket"))?;
        Ok(ConsoleSocket { ours, theirs })
    }

    /// The end that libcontainer sends the master into.
    pub fn container_end(&self) -> RawFd {
        self.theirs.as_raw_fd()
    }

    /// The master, which was sent before libcontainer returned.
    pub fn receive(self) -> Result<OwnedFd, Failure> {
        sys::set_nonblocking(&self.ours)
            .and_then(|()| ipc::receive(&self.ours))
            .and_then(|message| {
                let fds = message.map(|(_, fds)| fds).unwrap_or_default();
                fds.into_iter()
                    .next()
                    .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
            })
            .map_err(Failure::io("receiving the terminal"))
    }
}

/// Gives the terminal its size, and its slave to the container's user (`uid` in
/// the guest), as runc does; for `plain`, see `plain_newlines` of agent.proto.
pub fn finish(master: &OwnedFd, process: &Process, uid: u32, plain: bool) -> Result<(), Failure> {
    if let Some(size) = process.console_size() {
        set_size(master, cells(size.height()), cells(size.width()))
            .map_err(Failure::io("setting the terminal's size"))?;
    }
    let slave = open_slave(master).map_err(Failure::io("opening the terminal"))?;
    if plain {
        keep_newlines(&slave).map_err(Failure::io("setting the terminal's mode"))?;
    }
    give_to(&slave, uid).map_err(Failure::io("giving the terminal to the user"))
}

/// Makes a terminal in the container this process has entered, and makes it the
/// terminal and the stdio of this process, the leader of a session. Returns its
/// master. `uid` is as seen here; for `plain`, see `plain_newlines` of agent.proto.
///
/// # Errors
/// `ENODEV` when the container's `/dev/ptmx` is not what it should be.
pub fn make_own(size: Option<(u64, u64)>, uid: u32, plain: bool) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = nix::fcntl::open("/dev/ptmx", flags, Mode::empty())?;
    // SAFETY: just opened by us.
    let master = unsafe { OwnedFd::from_raw_fd(master) };
    // The container may have put anything in its place (devices.txt: 5:2).
    let device = nix::sys::stat::fstat(master.as_raw_fd())?;
    if device.st_mode & libc::S_IFMT != libc::S_IFCHR || device.st_rdev != libc::makedev(5, 2) {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int.
    let unlocked = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) };
    sys::check(unlocked.into())?;
    let slave = open_slave(&master)?;
    if let Some((height, width)) = size {
        set_size(&master, cells(height), cells(width))?;
    }
    if plain {
        keep_newlines(&slave)?;
    }
    give_to(&slave, uid)?;
    // SAFETY: plain integers.
    sys::check(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) }.into())?;
    for stdio in 0..3 {
        sys::dup2(&slave, stdio)?;
    }
    Ok(master)
}

/// Takes ONLCR out of the terminal's mode.
fn keep_newlines(slave: &OwnedFd) -> io::Result<()> {
    let mut mode = tcgetattr(slave)?;
    mode.output_flags.remove(OutputFlags::ONLCR);
    Ok(tcsetattr(slave, SetArg::TCSANOW, &mode)?)
}

fn cells(n: u64) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
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
    let set = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    sys::check(set.into())?;
    Ok(())
}

/// Hangs the terminal up as the end of its last master would.
///
/// # Errors
/// Of the ioctls.
pub fn hang_up(master: &OwnedFd) -> io::Result<()> {
    let slave = open_slave(master)?;
    // SAFETY: TIOCVHANGUP takes no argument.
    sys::check(unsafe { libc::ioctl(slave.as_raw_fd(), TIOCVHANGUP) }.into())?;
    Ok(())
}

/// `include/uapi/asm-generic/ioctls.h`.
const TIOCVHANGUP: libc::Ioctl = 0x5437;

/// The slave of a master, by no path.
fn open_slave(master: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags and returns a descriptor.
    let slave =
        sys::check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())?;
    // SAFETY: just made for us; descriptors fit an int.
    Ok(unsafe { OwnedFd::from_raw_fd(slave as RawFd) })
}
