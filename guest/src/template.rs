//! A machine that is saved before it is anybody's, and goes on many times.
//!
//! All machines of a template have the same memory when they begin: the same kernel, and
//! the same state of its random number generator. So the agent stops before there is
//! anything that must not be shared, and what it gets from the host first, when the machine
//! goes on, is entropy and the time. Then it executes itself anew: addresses, stack
//! protector and hash keys of the agent and all its children are this machine's own.

use std::convert::Infallible;
use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use kuasar_runv_protocol::template::{Identity, Prepared, SEED_LEN};
use kuasar_runv_protocol::{PROTOCOL_VERSION, TEMPLATE_PORT};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, listen, socket,
};

use crate::sys;

/// What the agent calls itself when it goes on. The kernel calls it by its path.
const RESTORED: &CStr = c"kuasar-runv-agent-restored";
/// Not reachable by another name: the image is below the root.
const EXECUTABLE: &CStr = c"/proc/self/exe";

/// Whether this is the agent of a machine that goes on.
#[must_use]
pub fn is_restored() -> bool {
    let name = std::env::args_os().next().unwrap_or_default();
    name.as_bytes() == RESTORED.to_bytes()
}

/// Waits to be saved, takes on the identity of the machine that goes on, and executes the
/// agent anew. Returns why not.
#[must_use]
pub fn hand_over() -> io::Error {
    let handed_over = || -> io::Result<Infallible> {
        take_on(&wait()?)?;
        let failed = nix::unistd::execv(EXECUTABLE, &[RESTORED]);
        failed.map_err(io::Error::from)
    };
    match handed_over() {
        Err(e) => e,
        Ok(never) => match never {},
    }
}

/// The machine is saved in here.
fn wait() -> io::Result<Identity> {
    let stream = || {
        let (family, flags) = (AddressFamily::Vsock, SockFlag::SOCK_CLOEXEC);
        socket(family, SockType::Stream, flags, None)
    };
    let listener = stream()?;
    let own = VsockAddr::new(libc::VMADDR_CID_ANY, TEMPLATE_PORT);
    bind(listener.as_raw_fd(), &own)?;
    listen(&listener, Backlog::new(1)?)?;

    let host = stream()?;
    let port = VsockAddr::new(libc::VMADDR_CID_HOST, TEMPLATE_PORT);
    connect(host.as_raw_fd(), &port)?;
    let prepared = Prepared {
        protocol_version: PROTOCOL_VERSION,
    };
    File::from(host).write_all(&prepared.encode())?;
    // Closed, and nothing awaited of it: the host saves the machine as soon as it has read
    // that, and in the machines that are made of it the connection has no other end.

    let accepted = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: just made for us.
    let accepted: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(accepted) };
    let mut identity = [0; Identity::LEN];
    File::from(accepted).read_exact(&mut identity)?;
    Ok(Identity::decode(&identity))
}

fn take_on(identity: &Identity) -> io::Result<()> {
    add_entropy(&identity.seed)?;
    let time = libc::timespec {
        // Seconds since 1970 of a 64-bit number of nanoseconds.
        tv_sec: (identity.realtime_ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (identity.realtime_ns % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: the struct is valid for the call.
    sys::check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) }.into())?;
    Ok(())
}

/// `struct rand_pool_info` of random(4), with its buffer.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; SEED_LEN],
}

/// `_IOW('R', 0x03, int [2])` and `_IO('R', 0x07)` of include/uapi/linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Has the kernel's generator forget what it would have said.
fn add_entropy(seed: &[u8; SEED_LEN]) -> io::Result<()> {
    let random = OpenOptions::new().write(true).open("/dev/urandom")?;
    let info = RandPoolInfo {
        // 512 bits in 64 bytes.
        entropy_count: SEED_LEN as libc::c_int * 8,
        buf_size: SEED_LEN as libc::c_int,
        buf: *seed,
    };
    // SAFETY: the struct is what the request reads, with its size in it.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &raw const info) };
    sys::check(added.into())?;
    // SAFETY: the request has no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _) };
    sys::check(reseeded.into())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_was_booted_is_not_one_that_goes_on() {
        assert!(!is_restored());
    }

    /// As `_IOW` and `_IO` of include/uapi/asm-generic/ioctl.h put them together.
    #[test]
    fn the_requests_are_the_kernels() {
        let size = (size_of::<RandPoolInfo>() - SEED_LEN) as libc::c_ulong;
        let letter = libc::c_ulong::from(b'R') << 8;
        assert_eq!(RNDADDENTROPY, 1 << 30 | size << 16 | letter | 3);
        assert_eq!(RNDRESEEDCRNG, letter | 7);
    }
}
