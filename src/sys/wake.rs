//! A descriptor that one thread makes readable to wake another (eventfd(2)).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

#[derive(Debug)]
pub struct Wake(OwnedFd);

impl Wake {
    /// # Errors
    /// As eventfd(2).
    pub fn new() -> io::Result<Wake> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Wake(eventfd(0, flags)?))
    }

    /// Makes it readable.
    ///
    /// # Errors
    /// As write(2).
    pub fn wake(&self) -> io::Result<()> {
        match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
            // It is.
            Err(Errno::AGAIN) => Ok(()),
            other => Ok(other.map(drop)?),
        }
    }

    /// Makes it unreadable; whether it was readable.
    ///
    /// # Errors
    /// As read(2).
    pub fn reset(&self) -> io::Result<bool> {
        match rustix::io::read(&self.0, &mut [0; 8]) {
            Err(Errno::AGAIN) => Ok(false),
            other => Ok(other.map(|_| true)?),
        }
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_readable_until_it_is_reset() {
        let wake = Wake::new().unwrap();
        assert!(!wake.reset().unwrap());
        wake.wake().unwrap();
        wake.wake().unwrap();
        assert!(wake.reset().unwrap());
        assert!(!wake.reset().unwrap());
    }
}
