//! A queue of a tap or macvtap interface (Documentation/networking/tuntap.rst).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{RwLock, RwLockReadGuard};

use super::{HEADER_LEN, feature};
use crate::vm::devices::vhost_user::PoisonFree;

/// Requests of linux/if_tun.h.
pub const TUNSETOFFLOAD: u64 = 0x4004_54d0;
pub const TUNSETQUEUE: u64 = 0x4004_54d9;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;

const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;
const TUN_F_TSO_ECN: libc::c_ulong = 8;

/// Closed when the device is detached: the interface ends with its last descriptor.
pub struct TapQueue(RwLock<Option<File>>);

impl TapQueue {
    /// Takes a copy of the descriptor.
    ///
    /// # Errors
    /// It is not one of an interface.
    pub fn new(fd: &OwnedFd) -> io::Result<TapQueue> {
        let file = File::from(fd.try_clone()?);
        let mut len = HEADER_LEN as libc::c_int;
        // SAFETY: the request reads an int, and the descriptor is open.
        check(unsafe {
            libc::ioctl(
                file.as_raw_fd(),
                TUNSETVNETHDRSZ as libc::Ioctl,
                &raw mut len,
            )
        })?;
        Ok(TapQueue(RwLock::new(Some(file))))
    }

    /// Any socket of datagrams as if it were an interface.
    #[cfg(any(test, fuzzing))]
    pub fn of_socket(socket: OwnedFd) -> TapQueue {
        TapQueue(RwLock::new(Some(File::from(socket))))
    }

    pub fn file(&self) -> RwLockReadGuard<'_, Option<File>> {
        self.0.read_unpoisoned()
    }

    pub fn close(&self) {
        *self.0.write_unpoisoned() = None;
    }

    /// -1, which nobody can watch, when it is closed.
    pub fn raw_fd(&self) -> RawFd {
        self.file().as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Says which features of a driver the interface may rely on: frames may be
    /// without checksums, or longer than the wire takes.
    ///
    /// # Errors
    /// The interface does not know one of them.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let pairs = [
            (feature::GUEST_CSUM, TUN_F_CSUM),
            (feature::GUEST_TSO4, TUN_F_TSO4),
            (feature::GUEST_TSO6, TUN_F_TSO6),
            (feature::GUEST_ECN, TUN_F_TSO_ECN),
        ];
        let mut offloads = 0;
        for (feature, offload) in pairs {
            // Segments have no checksums of their own.
            if features & feature != 0 && features & feature::GUEST_CSUM != 0 {
                offloads |= offload;
            }
        }
        if offloads & (TUN_F_TSO4 | TUN_F_TSO6) == 0 {
            offloads &= !TUN_F_TSO_ECN;
        }
        let Some(file) = &*self.file() else {
            return Ok(());
        };
        // SAFETY: the request takes a number, and the descriptor is open.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD as libc::Ioctl, offloads) })
    }

    /// Whether the interface may put frames into this queue.
    ///
    /// # Errors
    /// The interface has only one queue, or the state is the wanted one already.
    pub fn set_active(&self, active: bool) -> io::Result<()> {
        let Some(file) = &*self.file() else {
            return Ok(());
        };
        // SAFETY: zeros are a valid value of the structure.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flags = match active {
            true => libc::IFF_ATTACH_QUEUE,
            false => libc::IFF_DETACH_QUEUE,
        };
        // Bits of a short.
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the request is a complete ifreq that outlives the call.
        check(unsafe {
            libc::ioctl(
                file.as_raw_fd(),
                TUNSETQUEUE as libc::Ioctl,
                &raw mut request,
            )
        })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
