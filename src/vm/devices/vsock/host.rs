//! The host's end of the device: the listening socket, the event loop's
//! descriptor set and the timer.
//!
//! Connections are watched edge-triggered, because a connection without credit
//! leaves its bytes in the socket for as long as it likes and must not wake the
//! device meanwhile. Room in a socket is watched for only while there is a
//! backlog.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::{UnlinkatFlags, unlinkat};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::table::Token;
use crate::sys::unix_socket;

/// Name of the listening socket; a guest that connects to port P of the host
/// reaches the socket of this name with `_P` behind it.
pub const SOCKET_NAME: &str = "vsock.sock";

/// How often deadlines are looked at while there are any.
const TICK: Duration = Duration::from_millis(500);

/// Most events taken at once.
const BATCH: usize = 64;

/// Longest CONNECT line: the word, a space, ten digits, the newline.
const MAX_LINE: usize = 19;

const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// What happened on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Clients wait to be accepted.
    Clients,
    /// Some deadline may have passed.
    Tick,
    /// Something happened to a connection's socket.
    Connection(Token, EventSet),
}

/// What a client's first line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Not complete yet.
    Partial,
    /// Connect to this port of the guest.
    Connect(u32),
    /// Not a CONNECT line.
    Malformed,
    /// The client has left.
    Gone,
}

/// Listener, event loop and timer.
#[derive(Debug)]
pub struct Host {
    dir: OwnedFd,
    listener: Option<UnixListener>,
    epoll: Epoll,
    timer: TimerFd,
    ticking: bool,
}

impl Host {
    /// Listens on [`SOCKET_NAME`] in `dir`.
    ///
    /// # Errors
    /// The socket exists already, or the process has too many descriptors.
    pub fn new(dir: OwnedFd) -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let epoll = Epoll::new()?;
        let listener = unix_socket::bind(&dir, SOCKET_NAME)?;
        let host = Self {
            dir,
            listener: Some(listener),
            epoll,
            timer,
            ticking: false,
        };
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Some(listener) = &host.listener {
            listener.set_nonblocking(true)?;
            host.control(ControlOperation::Add, listener.as_raw_fd(), edge, LISTENER)?;
        }
        let timer = host.timer.as_fd().as_raw_fd();
        host.control(ControlOperation::Add, timer, edge, TIMER)?;
        Ok(host)
    }

    fn control(&self, how: ControlOperation, fd: RawFd, on: EventSet, data: u64) -> io::Result<()> {
        self.epoll.ctl(how, fd, EpollEvent::new(on, data))
    }

    /// Readable whenever [`Host::events`] has something to say.
    #[must_use]
    pub fn poll_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Waits until something has happened; `false` if nothing has.
    #[must_use]
    pub fn wait(&self, patience: Duration) -> bool {
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        // SAFETY: the epoll descriptor is open as long as `self` lives.
        let epoll = unsafe { BorrowedFd::borrow_raw(self.epoll.as_raw_fd()) };
        let mut fds = [PollFd::new(epoll, PollFlags::POLLIN)];
        // A signal is not worth another look at the clock.
        matches!(poll(&mut fds, timeout), Ok(1) | Err(Errno::EINTR))
    }

    /// Refuses clients from now on.
    pub fn stop_listening(&mut self) {
        if self.listener.take().is_some() {
            // The name is of no use without the listener. Best effort: the whole
            // directory goes when the sandbox does.
            let dir = Some(self.dir.as_raw_fd());
            let _ = unlinkat(dir, SOCKET_NAME, UnlinkatFlags::NoRemoveDir);
        }
    }

    /// Takes what has happened, without waiting.
    ///
    /// # Errors
    /// Those of epoll_wait(2).
    pub fn events(&self, into: &mut Vec<Event>) -> io::Result<()> {
        let mut raw = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(0, &mut raw) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            count => count?,
        };
        into.extend(raw.iter().take(count).map(|event| match event.data() {
            LISTENER => Event::Clients,
            TIMER => {
                // An interval timer goes on only once it has been read. Fails
                // only when it has been disarmed meanwhile.
                let _ = self.timer.wait();
                Event::Tick
            }
            data => Event::Connection(
                Token::from_u64(data),
                EventSet::from_bits_truncate(event.events),
            ),
        }));
        Ok(())
    }

    /// The next client, or `None` when nobody waits.
    ///
    /// # Errors
    /// Those of accept(2), such as too many open files.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        let Some(listener) = &self.listener else {
            return Ok(None);
        };
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    return Ok(Some(stream));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // Both concern one client only.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Connects to whoever serves `port` of the host.
    ///
    /// # Errors
    /// Nobody does, or its queue is full.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        unix_socket::connect_nonblocking(&self.dir, &format!("{SOCKET_NAME}_{port}"))
    }

    /// Starts to watch a connection, also for room to write if `room`.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn watch(&self, fd: RawFd, token: Token) -> io::Result<()> {
        let on = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.control(ControlOperation::Add, fd, on, token.to_u64())
    }

    /// Starts or stops to watch a connection for room to write.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn watch_room(&self, fd: RawFd, token: Token, room: bool) -> io::Result<()> {
        let mut on = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        on.set(EventSet::OUT, room);
        self.control(ControlOperation::Modify, fd, on, token.to_u64())
    }

    /// Makes [`Event::Tick`]s happen, or not.
    pub fn set_ticking(&mut self, ticking: bool) {
        if self.ticking == ticking {
            return;
        }
        let done = if ticking {
            let expiration = Expiration::Interval(TimeSpec::from_duration(TICK));
            self.timer.set(expiration, TimerSetTimeFlags::empty())
        } else {
            self.timer.unset()
        };
        match done {
            Ok(()) => self.ticking = ticking,
            Err(e) => log::error!("vsock: cannot set the timer: {e}"),
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop_listening();
    }
}

/// Reads a client's first line, and not a byte behind it.
#[must_use]
pub fn read_greeting(socket: &UnixStream) -> Greeting {
    let mut line = [0u8; MAX_LINE];
    let Some(peeked) = receive(socket, &mut line, libc::MSG_PEEK) else {
        return Greeting::Partial;
    };
    if peeked == 0 {
        return Greeting::Gone;
    }
    let Some(end) = line[..peeked].iter().position(|&byte| byte == b'\n') else {
        let hopeless = peeked == MAX_LINE || !is_prefix(&line[..peeked]);
        return if hopeless {
            Greeting::Malformed
        } else {
            Greeting::Partial
        };
    };
    // The bytes were just seen in the socket, and nobody else reads from it.
    let mut consumed = [0u8; MAX_LINE];
    receive(socket, &mut consumed[..=end], 0);
    parse(&line[..end]).map_or(Greeting::Malformed, Greeting::Connect)
}

const WORD: &[u8] = b"CONNECT ";

fn is_prefix(line: &[u8]) -> bool {
    line.iter().zip(WORD).all(|(a, b)| a == b)
}

fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(WORD)?;
    let plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits)
        .ok()
        .filter(|_| plain)?
        .parse()
        .ok()
}

/// Bytes received, 0 when the client is gone, `None` when there are none yet.
fn receive(socket: &UnixStream, into: &mut [u8], flags: libc::c_int) -> Option<usize> {
    loop {
        // SAFETY: the pointer and the length describe `into`.
        let count = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                into.as_mut_ptr().cast(),
                into.len(),
                flags | libc::MSG_DONTWAIT,
            )
        };
        if let Ok(count) = usize::try_from(count) {
            return Some(count);
        }
        match io::Error::last_os_error().kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return None,
            _ => return Some(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn bytes_behind_the_line_stay_in_the_socket() {
        let (mut client, mut server) = UnixStream::pair().unwrap();
        assert_eq!(read_greeting(&server), Greeting::Partial);
        client.write_all(b"CONN").unwrap();
        assert_eq!(read_greeting(&server), Greeting::Partial);
        client.write_all(b"ECT 4294967295\nCONNECT 2\n").unwrap();
        assert_eq!(read_greeting(&server), Greeting::Connect(u32::MAX));
        drop(client);
        let mut rest = String::new();
        server.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "CONNECT 2\n");
    }

    #[test]
    fn other_lines_are_refused() {
        let lines: [&[u8]; 7] = [
            b"GET / HTTP/1.1\r\n",
            b"CONNECT \n",
            b"CONNECT +1\n",
            b"CONNECT 1 \n",
            b"CONNECT 4294967296\n",
            b"CONNECT 00000000000000000001\n",
            b"X",
        ];
        for line in lines {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(line).unwrap();
            assert_eq!(read_greeting(&server), Greeting::Malformed, "{line:?}");
        }
    }

    #[test]
    fn a_client_that_leaves_is_noticed() {
        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(read_greeting(&server), Greeting::Gone);
    }
}
