//! Bytes between two connected sockets: one of the host and one of the guest.
//!
//! One loop for both directions, with one bounded buffer each; the end of a direction
//! travels on. When a side is gone altogether, so that nobody is there to take what the other
//! may still say, it is over for both.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};

use crate::sys::wake::Wake;

const BUFFER: usize = 32 * 1024;

/// One direction.
struct Way<'a> {
    from: BorrowedFd<'a>,
    to: BorrowedFd<'a>,
    buffer: Vec<u8>,
    /// What has been read and not written yet.
    pending: Range<usize>,
    has_ended: bool,
}

/// Moves bytes both ways until both have ended, a side is gone, or `stop` is readable.
///
/// # Errors
/// Of the sockets.
pub fn relay(a: &impl AsFd, b: &impl AsFd, stop: Option<&Wake>) -> io::Result<()> {
    for fd in [a.as_fd(), b.as_fd()] {
        let flags = rustix::fs::fcntl_getfl(fd)?;
        rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
    }
    let mut ways = [
        Way::new(a.as_fd(), b.as_fd()),
        Way::new(b.as_fd(), a.as_fd()),
    ];
    while !ways.iter().all(|way| way.has_ended) {
        let mut fds: Vec<_> = ways.iter().map(Way::waits_for).collect();
        fds.extend(stop.map(|stop| PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        }
        let is_gone = |(way, fd): (&Way, &PollFd)| way.has_ended && !fd.revents().is_empty();
        let is_told = fds
            .get(ways.len())
            .is_some_and(|stop| !stop.revents().is_empty());
        if is_told || ways.iter().zip(&fds).any(is_gone) {
            return Ok(());
        }
        for way in &mut ways {
            way.go_on()?;
        }
    }
    Ok(())
}

impl<'a> Way<'a> {
    fn new(from: BorrowedFd<'a>, to: BorrowedFd<'a>) -> Way<'a> {
        Way {
            from,
            to,
            buffer: vec![0; BUFFER],
            pending: 0..0,
            has_ended: false,
        }
    }

    /// What lets it go on; once it has ended, its source's hang-up, which poll(2) reports unasked.
    fn waits_for(&self) -> PollFd<'a> {
        match self.pending.is_empty() {
            _ if self.has_ended => PollFd::from_borrowed_fd(self.from, PollFlags::empty()),
            true => PollFd::from_borrowed_fd(self.from, PollFlags::IN),
            false => PollFd::from_borrowed_fd(self.to, PollFlags::OUT),
        }
    }

    /// Reads and writes what is possible at once.
    fn go_on(&mut self) -> io::Result<()> {
        if self.has_ended {
            return Ok(());
        }
        if self.pending.is_empty() {
            match rustix::io::read(self.from, &mut self.buffer) {
                Ok(0) => {
                    self.has_ended = true;
                    return match shutdown(self.to, Shutdown::Write) {
                        // It has ended as well.
                        Err(Errno::NOTCONN) => Ok(()),
                        other => Ok(other?),
                    };
                }
                Ok(n) => self.pending = 0..n,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
        match send(
            self.to,
            &self.buffer[self.pending.clone()],
            SendFlags::NOSIGNAL,
        ) {
            Ok(n) => self.pending.start += n,
            Err(Errno::AGAIN | Errno::INTR) => {}
            // It takes no more, and may have something to say yet.
            Err(Errno::PIPE) => {
                self.has_ended = true;
                shutdown(self.from, Shutdown::Read)?;
            }
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net;
    use std::os::unix::net::UnixStream;

    /// A client and a server with a relay between them.
    fn relayed() -> (
        UnixStream,
        UnixStream,
        std::thread::JoinHandle<io::Result<()>>,
    ) {
        let (client, a) = UnixStream::pair().unwrap();
        let (server, b) = UnixStream::pair().unwrap();
        let relay = std::thread::spawn(move || relay(&a, &b, None));
        (client, server, relay)
    }

    #[test]
    fn each_direction_ends_by_itself() {
        let (mut client, mut server, relay) = relayed();
        client.write_all(b"question").unwrap();
        client.shutdown(net::Shutdown::Write).unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).unwrap();
        assert_eq!(question, "question");
        // More than all buffers on the way.
        let writer = std::thread::spawn(move || server.write_all(&vec![7; 1 << 20]).unwrap());
        let mut reply = Vec::new();
        client.read_to_end(&mut reply).unwrap();
        assert_eq!(reply.len(), 1 << 20);
        writer.join().unwrap();
        relay.join().unwrap().unwrap();
    }

    #[test]
    fn it_ends_when_a_side_is_gone() {
        let (mut client, server, relay) = relayed();
        drop(server);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        // Nobody takes it any more.
        let _ = client.write_all(b"x");
        drop(client);
        let _ = relay.join().unwrap();
    }

    #[test]
    fn a_side_that_reads_no_more_may_go_on_writing() {
        let (mut client, mut server, relay) = relayed();
        server.shutdown(net::Shutdown::Read).unwrap();
        while client.write_all(b"question").is_ok() {}
        server.write_all(b"answer").unwrap();
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
        relay.join().unwrap().unwrap();
    }

    /// A service that never closes keeps nothing once its client is gone.
    #[test]
    fn a_client_that_is_gone_is_not_one_that_listens() {
        let (mut client, mut server, relay) = relayed();
        client.write_all(b"last words").unwrap();
        drop(client);
        relay.join().unwrap().unwrap();
        let mut words = String::new();
        server.read_to_string(&mut words).unwrap();
        assert_eq!(words, "last words");
        assert!(server.write_all(b"x").is_err());
    }

    #[test]
    fn it_ends_when_it_is_told_to() {
        let (_client, a) = UnixStream::pair().unwrap();
        let (_server, b) = UnixStream::pair().unwrap();
        let stop = Wake::new().unwrap();
        stop.wake().unwrap();
        relay(&a, &b, Some(&stop)).unwrap();
    }
}
