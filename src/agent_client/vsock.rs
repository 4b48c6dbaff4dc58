//! Opening streams to vsock ports of the guest.
//!
//! The VM's vsock device is a unix socket on the host: a client writes
//! `CONNECT <port>\n` and gets `OK <its port>\n` once the guest has accepted,
//! or another line with the reason why not. After `OK` the socket is the stream.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::sys::unix_socket;

/// Longest answer line of the device, in bytes.
pub(super) const MAX_LINE: usize = 128;

/// Asks for a port without waiting for the answer, so that several can be
/// asked for at once; [`Dialing::finish`] waits.
///
/// # Errors
/// As connect(2).
pub fn start(dir: BorrowedFd<'_>, name: &str, port: u32) -> io::Result<Dialing> {
    let mut stream = unix_socket::connect(dir, name)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    Ok(Dialing(stream))
}

/// A connection that has been asked for.
#[derive(Debug)]
pub struct Dialing(UnixStream);

impl Dialing {
    /// A connection that is asked for already.
    #[cfg(any(test, fuzzing))]
    pub fn of_stream(stream: UnixStream) -> Dialing {
        Dialing(stream)
    }

    /// Sends the first bytes of the stream ahead; the device keeps them until the
    /// guest has accepted. They have to fit into the socket's buffer.
    ///
    /// # Errors
    /// As write(2).
    pub fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// Waits for the guest to accept.
    ///
    /// # Errors
    /// `ConnectionRefused` with the device's reason, `TimedOut`.
    pub fn finish(self, deadline: Duration) -> io::Result<UnixStream> {
        let Dialing(mut stream) = self;
        stream.set_read_timeout(Some(deadline))?;
        let line = read_line(&mut stream).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => e,
        })?;
        if !line.starts_with("OK ") {
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, line));
        }
        stream.set_read_timeout(None)?;
        Ok(stream)
    }
}

impl AsFd for Dialing {
    /// Readable when there is an answer.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Byte by byte: what follows the line belongs to the stream.
fn read_line(stream: &mut impl Read) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        if stream.read(&mut byte)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                "the device closed the connection",
            ));
        }
        match byte[0] {
            b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
            _ if line.len() == MAX_LINE => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the device's answer is too long",
                ));
            }
            other => line.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(answer: &[u8]) -> io::Result<UnixStream> {
        let (ours, mut device) = UnixStream::pair().unwrap();
        device.write_all(answer).unwrap();
        drop(device);
        Dialing(ours).finish(Duration::from_secs(5))
    }

    #[test]
    fn bytes_behind_the_answer_belong_to_the_stream() {
        let mut stream = finish(b"OK 1073741824\nhello").unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn a_refusal_is_not_an_end_of_file() {
        let refused = finish(b"ERR connection refused\n").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(refused.to_string().contains("connection refused"));
        assert!(finish(b"").is_err());
        assert!(finish(&[b'x'; 1000]).is_err());
    }

    #[test]
    fn a_silent_device_times_out() {
        let (ours, _device) = UnixStream::pair().unwrap();
        let late = Dialing(ours).finish(Duration::from_millis(10)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    }
}
