//! The loopback interface of the current network namespace.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::sys;

/// Brings `lo` up; the kernel gives it its addresses.
///
/// # Errors
/// Of the ioctls; a kernel without IPv4.
pub fn bring_up_loopback() -> io::Result<()> {
    // SAFETY: plain integers.
    let socket = sys::check(
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }.into(),
    )?;
    // SAFETY: just made for us; descriptors fit an int.
    let socket = unsafe { OwnedFd::from_raw_fd(socket as i32) };
    // SAFETY: ifreq is plain data, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    let fd = socket.as_raw_fd();
    // SAFETY: the request names an interface and has room for its flags.
    sys::check(unsafe { libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request) }.into())?;
    // SAFETY: the call above stored the flags, which is the active union field.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: as above.
    sys::check(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request) }.into())?;
    Ok(())
}
