//! One direction of one stream: read into a buffer when it is empty, written from it
//! as the other side takes it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::event::PollFlags;
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::{Pair, Relayed};

/// Buffer of one direction, in bytes.
const BUFFER: usize = 32 * 1024;
/// What a pipe that poll(2) calls writable takes without blocking (pipe(7)).
const PIPE_CHUNK: usize = libc::PIPE_BUF;
/// What a terminal that poll(2) calls writable takes without blocking: fewer
/// than 256 bytes are queued then, in at least 4096.
const TTY_CHUNK: usize = 2048;

/// See the module's description.
pub struct Pump {
    /// `None` once the source has ended.
    source: Option<End>,
    /// `None` once the sink is closed.
    sink: Option<End>,
    buffer: Vec<u8>,
    /// The part of `buffer` that still has to be written.
    pending: std::ops::Range<usize>,
    /// The sink does not take any more.
    broken: bool,
    /// A sink that does not take any more is noticed without writing to it.
    watches_sink: bool,
}

/// Where bytes come from or go to.
enum End {
    /// Standard streams are inherited, and stay open.
    Stdio(BorrowedFd<'static>, FileType),
    /// Closed with the last direction that uses it.
    Host(Rc<OwnedFd>, FileType),
    Guest(Rc<OwnedFd>),
}

impl End {
    fn stdio(fd: BorrowedFd<'static>) -> End {
        End::Stdio(fd, file_type(fd))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            End::Stdio(fd, _) => *fd,
            End::Host(fd, _) | End::Guest(fd) => fd.as_fd(),
        }
    }

    fn file_type(&self) -> FileType {
        match self {
            End::Stdio(_, kind) | End::Host(_, kind) => *kind,
            End::Guest(_) => FileType::Socket,
        }
    }

    fn read(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            End::Stdio(fd, _) => rustix::io::read(*fd, buffer),
            End::Host(fd, FileType::Socket) | End::Guest(fd) => {
                recv(fd, buffer, RecvFlags::DONTWAIT).map(|(n, _)| n)
            }
            End::Host(fd, _) => rustix::io::read(fd, buffer),
        }
    }

    fn write(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        let fd = self.fd();
        match self.file_type() {
            FileType::Socket => send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            FileType::Fifo => match write_nowait(fd, bytes) {
                // Kernels before 6.4 have no such write for pipes.
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::SPIPE) => {
                    rustix::io::write(fd, &bytes[..bytes.len().min(PIPE_CHUNK)])
                }
                other => other,
            },
            FileType::CharacterDevice => {
                rustix::io::write(fd, &bytes[..bytes.len().min(TTY_CHUNK)])
            }
            _ => rustix::io::write(fd, bytes),
        }
    }

    /// Tells the other end of what is not closed by going out of use: a socket, which
    /// may have another direction.
    fn end(&self, how: Shutdown) {
        let is_ours = !matches!(self, End::Stdio(..));
        if is_ours && self.file_type() == FileType::Socket {
            // It may be closed already.
            let _ = shutdown(self.fd(), how);
        }
    }
}

fn file_type(fd: BorrowedFd<'_>) -> FileType {
    rustix::fs::fstat(fd)
        .map(|stat| FileType::from_raw_mode(stat.st_mode))
        .unwrap_or(FileType::Unknown)
}

/// A write that returns `EAGAIN` instead of blocking although the descriptor is
/// a blocking one.
fn write_nowait(fd: BorrowedFd<'_>, bytes: &[u8]) -> rustix::io::Result<usize> {
    let vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: the vector describes `bytes`, which outlives the call and is only
    // read from.
    let written =
        unsafe { libc::pwritev2(fd.as_raw_fd(), &raw const vector, 1, -1, libc::RWF_NOWAIT) };
    usize::try_from(written)
        .map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

impl Pump {
    /// From stdin to the guest.
    pub fn input(host: BorrowedFd<'static>, guest: OwnedFd) -> Pump {
        Pump::new(End::stdio(host), End::Guest(Rc::new(guest)))
    }

    /// From the guest to stdout or stderr.
    pub fn output(guest: OwnedFd, host: BorrowedFd<'static>) -> Pump {
        Pump::new(End::Guest(Rc::new(guest)), End::stdio(host))
    }

    /// The directions of something else that is relayed.
    pub fn of(pair: Pair) -> Vec<Pump> {
        let kind = file_type(pair.host.as_fd());
        let (guest, host) = (Rc::new(pair.guest), Rc::new(pair.host));
        let input = || {
            Pump::new(
                End::Host(Rc::clone(&host), kind),
                End::Guest(Rc::clone(&guest)),
            )
        };
        let output = || {
            Pump::new(
                End::Guest(Rc::clone(&guest)),
                End::Host(Rc::clone(&host), kind),
            )
        };
        let mut pumps = match pair.kind {
            Relayed::Input => vec![input()],
            Relayed::Output => vec![output()],
            Relayed::Socket => vec![input(), output()],
        };
        for pump in &mut pumps {
            pump.watches_sink = true;
        }
        pumps
    }

    fn new(source: End, sink: End) -> Pump {
        Pump {
            source: Some(source),
            sink: Some(sink),
            buffer: Vec::new(),
            pending: 0..0,
            broken: false,
            watches_sink: false,
        }
    }

    pub fn is_done(&self) -> bool {
        self.sink.is_none() || (self.source.is_none() && self.pending.is_empty())
    }

    /// The sink did not take everything.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    pub fn is_towards_guest(&self) -> bool {
        matches!(self.sink, Some(End::Guest(_)))
    }

    /// What to wait for, if anything.
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match (&self.source, &self.sink) {
            (_, None) => None,
            (_, Some(sink)) if !self.pending.is_empty() => Some((sink.fd(), PollFlags::OUT)),
            (Some(source), Some(_)) => Some((source.fd(), PollFlags::IN)),
            (None, Some(_)) => None,
        }
    }

    /// What tells that the sink does not take any more, when nothing is to be written:
    /// errors and hang-ups, which poll(2) always reports.
    pub fn watched_sink(&self) -> Option<BorrowedFd<'_>> {
        let is_idle = self.watches_sink && self.pending.is_empty() && self.source.is_some();
        self.sink.as_ref().filter(|_| is_idle).map(End::fd)
    }

    /// Moves what can be moved without blocking, once.
    pub fn advance(&mut self) {
        if self.pending.is_empty() {
            self.fill();
        }
        if !self.pending.is_empty() {
            self.drain();
        }
        if self.source.is_none() && self.pending.is_empty() {
            self.end_sink();
        }
    }

    fn fill(&mut self) {
        let Some(source) = &self.source else { return };
        if self.buffer.is_empty() {
            self.buffer = vec![0; BUFFER];
        }
        match source.read(&mut self.buffer) {
            Ok(0) => self.source = None,
            Ok(n) => self.pending = 0..n,
            Err(Errno::AGAIN | Errno::INTR) => {}
            // A terminal that hung up, a reset connection: an end like any other.
            Err(_) => self.source = None,
        }
    }

    fn drain(&mut self) {
        let Some(sink) = &self.sink else { return };
        match sink.write(&self.buffer[self.pending.clone()]) {
            Ok(n) => self.pending.start += n,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.break_off(),
        }
    }

    /// Nobody reads any more. Closing the source tells the writer, which then gets its
    /// SIGPIPE.
    pub fn break_off(&mut self) {
        self.sink = None;
        if let Some(source) = self.source.take() {
            source.end(Shutdown::Read);
        }
        self.pending = 0..0;
        self.broken = true;
    }

    /// Passes the end of the stream on.
    fn end_sink(&mut self) {
        if let Some(sink) = self.sink.take() {
            sink.end(Shutdown::Write);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeReader, PipeWriter, Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use rustix::event::{PollFd, Timespec, poll};

    fn connected() -> (OwnedFd, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        (ours.into(), theirs)
    }

    fn pair(kind: Relayed, host: impl Into<OwnedFd>) -> (Vec<Pump>, UnixStream) {
        let (guest, agent) = connected();
        let host = host.into();
        (Pump::of(Pair { kind, guest, host }), agent)
    }

    /// As the relay's loop, until nothing more happens.
    fn turn(pumps: &mut [Pump]) {
        let now = Timespec::default();
        let mut left = 1000;
        let mut moved = true;
        while moved && left > 0 {
            moved = false;
            left -= 1;
            for pump in &mut *pumps {
                let ready = |fd: BorrowedFd<'_>, flags| {
                    let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
                    poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().is_empty()
                };
                let gone = pump
                    .watched_sink()
                    .is_some_and(|fd| ready(fd, PollFlags::empty()));
                let can = pump.interest().is_some_and(|(fd, flags)| ready(fd, flags));
                if gone {
                    pump.break_off();
                } else if can {
                    pump.advance();
                }
                moved |= gone || can;
            }
        }
        assert!(left > 0, "busy");
    }

    fn pipe() -> (PipeReader, PipeWriter) {
        io::pipe().unwrap()
    }

    #[test]
    fn the_end_of_a_preserved_pipe_travels_in_both_directions() {
        let (read, mut write) = pipe();
        let (mut pumps, mut agent) = pair(Relayed::Input, read);
        write.write_all(b"in").unwrap();
        drop(write);
        turn(&mut pumps);
        let mut all = String::new();
        agent.read_to_string(&mut all).unwrap();
        assert_eq!(all, "in");

        let (mut read, write) = pipe();
        let (mut pumps, mut agent) = pair(Relayed::Output, write);
        agent.write_all(b"out").unwrap();
        drop(agent);
        turn(&mut pumps);
        all.clear();
        // Ends only when the pump has closed its end.
        read.read_to_string(&mut all).unwrap();
        assert_eq!(all, "out");
    }

    #[test]
    fn a_reader_that_is_gone_is_told_without_a_write() {
        let (read, write) = pipe();
        let (mut pumps, mut agent) = pair(Relayed::Output, write);
        turn(&mut pumps);
        assert!(!pumps[0].is_done());
        drop(read);
        turn(&mut pumps);
        assert!(pumps[0].is_done() && pumps[0].is_broken());
        assert!(agent.write_all(b"x").is_err());

        let (read, mut write) = pipe();
        let (mut pumps, agent) = pair(Relayed::Input, read);
        drop(agent);
        turn(&mut pumps);
        assert!(write.write_all(b"x").is_err());
    }

    #[test]
    fn the_directions_of_a_socket_end_by_themselves() {
        let (host, mut peer) = connected();
        let (mut pumps, mut agent) = pair(Relayed::Socket, host);
        peer.write_all(b"question").unwrap();
        peer.shutdown(std::net::Shutdown::Write).unwrap();
        turn(&mut pumps);
        let mut all = String::new();
        agent.read_to_string(&mut all).unwrap();
        assert_eq!(all, "question");
        agent.write_all(b"answer").unwrap();
        turn(&mut pumps);
        agent.shutdown(std::net::Shutdown::Write).unwrap();
        turn(&mut pumps);
        all.clear();
        peer.read_to_string(&mut all).unwrap();
        assert_eq!(all, "answer");
        assert!(pumps.iter().all(Pump::is_done));
    }

    #[test]
    fn a_slow_reader_stops_the_writer() {
        let (read, write) = pipe();
        let (mut pumps, mut agent) = pair(Relayed::Output, write);
        agent.set_nonblocking(true).unwrap();
        let mut written = 0;
        while let Ok(n) = agent.write(&[0; 4096]) {
            written += n;
            turn(&mut pumps);
            assert!(written < 4 << 20, "nothing stops it");
        }
        let reader = std::thread::spawn(move || {
            let mut read = read;
            let mut all = Vec::new();
            read.read_to_end(&mut all).unwrap();
            all.len()
        });
        drop(agent);
        while !pumps[0].is_done() {
            turn(&mut pumps);
            std::thread::yield_now();
        }
        drop(pumps);
        assert_eq!(reader.join().unwrap(), written);
    }
}
