//! A non-blocking descriptor on the runtime: a socket, a pipe or a terminal.
//!
//! Not tokio's own types, because the relays need `splice`, half-close of vsock
//! and the readiness of both ends at once.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::io::{Interest, Ready};

use crate::sys;

/// A descriptor on the runtime; clones share it.
#[derive(Clone)]
pub struct Connection(Arc<AsyncFd<OwnedFd>>);

impl Connection {
    /// # Errors
    /// Of registering with epoll.
    pub fn new(fd: OwnedFd) -> io::Result<Connection> {
        Connection::with_interest(fd, Interest::READABLE | Interest::WRITABLE)
    }

    /// For one end of a pipe, which epoll reports an error on otherwise.
    ///
    /// # Errors
    /// Of registering with epoll.
    pub fn with_interest(fd: OwnedFd, interest: Interest) -> io::Result<Connection> {
        sys::set_nonblocking(&fd)?;
        Ok(Connection(Arc::new(sys::on_runtime(fd, interest)?)))
    }

    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> &OwnedFd {
        self.0.get_ref()
    }

    /// Reads what there is; 0 at the end.
    ///
    /// # Errors
    /// Of read(2).
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.readable().await?;
            match nix::unistd::read(self.0.as_raw_fd(), buffer) {
                Err(nix::Error::EAGAIN) => ready.clear_ready(),
                Err(nix::Error::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Fills the buffer.
    ///
    /// # Errors
    /// Of read(2); `UnexpectedEof`.
    pub async fn read_exact(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.read(buffer).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => buffer = &mut buffer[n..],
            }
        }
        Ok(())
    }

    /// Writes everything.
    ///
    /// # Errors
    /// Of write(2); `EPIPE` when the peer reads no more.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.writable().await?;
            match nix::unistd::write(self.0.get_ref().as_fd(), bytes) {
                Err(nix::Error::EAGAIN) => ready.clear_ready(),
                Err(nix::Error::EINTR) => {}
                result => bytes = &bytes[result?..],
            }
        }
        Ok(())
    }

    /// # Errors
    /// When the runtime shuts down.
    pub async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.0.readable().await
    }

    /// # Errors
    /// When the runtime shuts down.
    pub async fn writable(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.0.writable().await
    }

    /// Waits until the other end of a pipe is closed.
    pub async fn broken(&self) {
        // The error of a runtime that shuts down ends the wait as well.
        drop(self.0.ready(Interest::ERROR).await);
    }

    /// Waits until the other end of a socket is closed altogether, and not just one
    /// direction of it.
    ///
    /// # Errors
    /// `EMFILE`, or when the runtime shuts down.
    pub async fn hung_up(&self) -> io::Result<()> {
        // Of its own: what is cleared here, the others would wait for.
        let watched = Connection::with_interest(self.fd().try_clone()?, Interest::WRITABLE)?;
        loop {
            let mut ready = watched.writable().await?;
            if ready.ready().is_write_closed() {
                return Ok(());
            }
            ready.clear_ready_matching(Ready::WRITABLE);
        }
    }

    /// Ends one direction of a socket. The peer may be gone, which is as good.
    pub fn shutdown(&self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => libc::SHUT_RD,
            Shutdown::Write => libc::SHUT_WR,
            Shutdown::Both => libc::SHUT_RDWR,
        };
        // SAFETY: plain integers.
        unsafe { libc::shutdown(self.0.as_raw_fd(), how) };
    }
}
