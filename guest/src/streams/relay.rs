//! Bytes between a process's pipes or terminal and its connections.
//!
//! Each relay is a task that moves bytes in one direction and holds no more than
//! one buffer: when the receiver does not take them, the sender waits in its own
//! write. The end of the stream travels in both directions.
//!
//! Output is spliced from the pipe to the socket without passing through this
//! process, where the kernel does that well. When the process ends, what it had written
//! by then is still sent; what others, who inherited the pipe, write later is thrown
//! away, unless somebody waits for it ([`OutputEnd`]).

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFdReadyGuard;

use super::Connection;
use crate::events::kernel_release;
use crate::reaper::ExitReceiver;
use crate::sys;

/// Bytes moved by one call, and sizes of the buffers where there is one.
const CHUNK: usize = 1024 * 1024;
const COPY_BUFFER: usize = 128 * 1024;
const INPUT_BUFFER: usize = 64 * 1024;
/// A terminal hands out at most a page at a time.
const TERMINAL_BUFFER: usize = 4096;
/// Calls after which other tasks get their turn.
const TURN: u32 = 16;

/// Waits for the process to end; never returns twice.
async fn ended(exit: &mut ExitReceiver) {
    // The sender is dropped only after it has sent.
    drop(exit.wait_for(Option::is_some).await);
}

/// When the output of a process ends: with the process, or when everybody has closed
/// it.
pub struct OutputEnd {
    exit: Option<ExitReceiver>,
}

impl OutputEnd {
    #[must_use]
    pub fn new(exit: ExitReceiver, outlives_process: bool) -> OutputEnd {
        OutputEnd {
            exit: (!outlives_process).then_some(exit),
        }
    }

    /// Waits for the end of a process that ends its output.
    async fn reached(&mut self) {
        match &mut self.exit {
            Some(exit) => ended(exit).await,
            None => std::future::pending().await,
        }
    }
}

/// What ended an output.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// Nobody can write to it any more.
    Closed,
    /// The process, as told by [`OutputEnd`].
    WithProcess,
}

/// From the pipe of stdout or stderr to its connection.
pub async fn relay_output(pipe: OwnedFd, connection: Connection, end: OutputEnd) {
    sys::set_vsock_buffer(connection.fd(), CHUNK as u64);
    let pipe = match Connection::with_interest(pipe, Interest::READABLE) {
        Ok(pipe) => pipe,
        Err(e) => return log::warn!("output stream: {e}"),
    };
    let result = match splice_pays() {
        true => splice_all(&pipe, &connection, Output::new(end)).await,
        false => copy_all(&pipe, &connection, Output::new(end)).await,
    };
    connection.shutdown(Shutdown::Write);
    drop(connection);
    match result {
        Ok(Ended::Closed) => {}
        // They are not to die of a broken pipe.
        Ok(Ended::WithProcess) => discard(&pipe).await,
        // The pipe closes with this task: the process gets SIGPIPE, as it would
        // from a reader of its own.
        Err(e) => log::debug!("output stream: {e}"),
    }
}

/// Reads to the end what nobody wants.
async fn discard(from: &Connection) {
    let mut buffer = Vec::new();
    loop {
        if from.readable().await.is_err() {
            return;
        }
        buffer.resize(COPY_BUFFER, 0);
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => tokio::task::yield_now().await,
        }
    }
}

/// Between a socket, whose other end a process has, and its connection. Each direction
/// ends by itself; all of it ends with the process.
pub async fn relay_socket(socket: OwnedFd, connection: Connection, end: OutputEnd) {
    let socket = match Connection::new(socket) {
        Ok(socket) => socket,
        Err(e) => return log::warn!("socket: {e}"),
    };
    let input = async {
        let copied = tokio::select! {
            biased;
            hung_up = socket.hung_up() => hung_up,
            copied = copy(&connection, &socket, INPUT_BUFFER) => copied,
        };
        if let Err(e) = copied {
            log::debug!("socket, input: {e}");
        }
        socket.shutdown(Shutdown::Write);
        // The stand-in learns that nobody reads any more.
        connection.shutdown(Shutdown::Read);
    };
    let output = async {
        let ended = copy_all(&socket, &connection, Output::new(end)).await;
        connection.shutdown(Shutdown::Write);
        match ended {
            Ok(Ended::Closed) => {}
            Ok(Ended::WithProcess) => {
                // Also for others who have it: nobody is at its other end any more.
                socket.shutdown(Shutdown::Both);
                connection.shutdown(Shutdown::Both);
            }
            Err(e) => {
                log::debug!("socket, output: {e}");
                socket.shutdown(Shutdown::Read);
            }
        }
    };
    tokio::join!(input, output);
}

/// Whether `splice` into a socket sends more than a page at a time. Until Linux
/// 6.5 it did not, and each page was a packet of its own: half the speed of
/// copying.
fn splice_pays() -> bool {
    static PAYS: OnceLock<bool> = OnceLock::new();
    *PAYS.get_or_init(|| kernel_release().is_ok_and(|release| is_since_6_5(&release)))
}

fn is_since_6_5(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next(), numbers.next());
    version >= (Some(6), Some(5))
}

/// How much of a process's output is still to be moved.
struct Output {
    end: OutputEnd,
    /// Bytes, once the process has ended.
    remaining: Option<usize>,
    moves: u32,
}

impl Output {
    fn new(end: OutputEnd) -> Output {
        Output {
            end,
            remaining: None,
            moves: 0,
        }
    }

    /// Waits until there is something to read; none at the end of the output.
    /// The number is the most that may be moved.
    async fn ready<'a>(
        &mut self,
        pipe: &'a Connection,
    ) -> io::Result<Option<(AsyncFdReadyGuard<'a, OwnedFd>, usize)>> {
        loop {
            let exit = self.end.exit.as_mut();
            if self.remaining.is_none() && exit.is_some_and(|e| e.borrow_and_update().is_some()) {
                self.remaining = Some(sys::bytes_available(pipe.fd())?);
            }
            if self.remaining == Some(0) {
                return Ok(None);
            }
            tokio::select! {
                biased;
                ready = pipe.readable() => {
                    let most = self.remaining.unwrap_or(CHUNK).min(CHUNK);
                    return Ok(Some((ready?, most)));
                }
                () = self.end.reached(), if self.remaining.is_none() => {}
            }
        }
    }

    async fn moved(&mut self, bytes: usize) {
        self.remaining = self.remaining.map(|r| r.saturating_sub(bytes));
        self.moves += 1;
        if self.moves.is_multiple_of(TURN) {
            tokio::task::yield_now().await;
        }
    }
}

async fn splice_all(
    pipe: &Connection,
    connection: &Connection,
    mut output: Output,
) -> io::Result<Ended> {
    while let Some((mut readable, most)) = output.ready(pipe).await? {
        let mut writable = connection.writable().await?;
        match splice(pipe, connection, most) {
            Ok(0) => return Ok(Ended::Closed),
            Ok(n) => {
                // Asking is cheaper than finding out by another attempt.
                if n < most && sys::bytes_available(pipe.fd())? == 0 {
                    readable.clear_ready();
                }
                output.moved(n).await;
            }
            Err(e) if sys::would_block(&e) => {
                // Either end may be meant.
                let (pipe_ready, connection_ready) = readiness(pipe, connection)?;
                if !pipe_ready {
                    readable.clear_ready();
                }
                if !connection_ready {
                    writable.clear_ready();
                }
                output.moved(0).await;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(Ended::WithProcess)
}

async fn copy_all(
    pipe: &Connection,
    connection: &Connection,
    mut output: Output,
) -> io::Result<Ended> {
    let mut buffer = Vec::new();
    while let Some((mut readable, most)) = output.ready(pipe).await? {
        // Many streams never carry anything.
        buffer.resize(COPY_BUFFER, 0);
        let most = most.min(buffer.len());
        match nix::unistd::read(pipe.fd().as_raw_fd(), &mut buffer[..most]) {
            Ok(0) => return Ok(Ended::Closed),
            Ok(n) => {
                connection.write_all(&buffer[..n]).await?;
                output.moved(n).await;
            }
            Err(nix::Error::EAGAIN) => readable.clear_ready(),
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(Ended::WithProcess)
}

fn splice(pipe: &Connection, connection: &Connection, len: usize) -> io::Result<usize> {
    loop {
        // SAFETY: null offsets: both ends are streams.
        let moved = sys::check(unsafe {
            libc::splice(
                pipe.fd().as_raw_fd(),
                std::ptr::null_mut(),
                connection.fd().as_raw_fd(),
                std::ptr::null_mut(),
                len,
                libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE,
            ) as libc::c_long
        });
        match moved {
            Ok(n) => return Ok(usize::try_from(n).unwrap_or(0)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Whether the pipe can be read and the connection written at this moment.
fn readiness(pipe: &Connection, connection: &Connection) -> io::Result<(bool, bool)> {
    let mut fds = [
        PollFd::new(pipe.fd().as_fd(), PollFlags::POLLIN),
        PollFd::new(connection.fd().as_fd(), PollFlags::POLLOUT),
    ];
    poll(&mut fds, PollTimeout::ZERO)?;
    let any = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
    Ok((any(&fds[0]), any(&fds[1])))
}

/// From the connection to the pipe of stdin. When either end closes, so does the
/// other.
pub async fn relay_input(connection: Connection, pipe: OwnedFd, mut exit: ExitReceiver) {
    let result = match Connection::with_interest(pipe, Interest::WRITABLE | Interest::ERROR) {
        Ok(pipe) => tokio::select! {
            biased;
            () = ended(&mut exit) => Ok(()),
            () = pipe.broken() => Ok(()),
            result = copy(&connection, &pipe, INPUT_BUFFER) => result,
        },
        Err(e) => Err(e),
    };
    if let Err(e) = result {
        log::debug!("input stream: {e}");
    }
    // The stand-in learns that nobody reads any more.
    connection.shutdown(Shutdown::Both);
}

/// From the terminal to its connection.
pub async fn relay_terminal_output(
    terminal: Connection,
    connection: Connection,
    mut exit: ExitReceiver,
) {
    let result = tokio::select! {
        biased;
        // Ends with EIO when the last process on the terminal is gone.
        result = copy(&terminal, &connection, TERMINAL_BUFFER) => result,
        () = ended(&mut exit) => drain_terminal(&terminal, &connection).await,
    };
    if let Err(e) = result {
        log::debug!("terminal: {e}");
    }
    connection.shutdown(Shutdown::Write);
}

/// Sends what the terminal still holds.
async fn drain_terminal(terminal: &Connection, connection: &Connection) -> io::Result<()> {
    let mut buffer = vec![0; TERMINAL_BUFFER];
    loop {
        match nix::unistd::read(terminal.fd().as_raw_fd(), &mut buffer) {
            Ok(0) | Err(nix::Error::EAGAIN | nix::Error::EIO) => return Ok(()),
            Ok(n) => connection.write_all(&buffer[..n]).await?,
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// From the connection to the terminal. The end of the input leaves the terminal
/// as it is.
pub async fn relay_terminal_input(
    connection: Connection,
    terminal: Connection,
    mut exit: ExitReceiver,
) {
    let result = tokio::select! {
        biased;
        () = ended(&mut exit) => Ok(()),
        result = copy(&connection, &terminal, TERMINAL_BUFFER) => result,
    };
    if let Err(e) = result {
        log::debug!("terminal input: {e}");
    }
}

async fn copy(from: &Connection, to: &Connection, buffer: usize) -> io::Result<()> {
    // Many streams never carry anything.
    drop(from.readable().await?);
    let mut buffer = vec![0; buffer];
    let mut turn = 0_u32;
    loop {
        match from.read(&mut buffer).await? {
            0 => return Ok(()),
            n => to.write_all(&buffer[..n]).await?,
        }
        turn += 1;
        if turn.is_multiple_of(TURN) {
            tokio::task::yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_since_6_5;

    #[test]
    fn releases_are_compared_by_number() {
        for old in ["5.15.0", "6.1.0-56-cloud-amd64", "6.4.16", "", "six"] {
            assert!(!is_since_6_5(old), "{old}");
        }
        for new in ["6.5.0", "6.12.117-kuasar", "7.0"] {
            assert!(is_since_6_5(new), "{new}");
        }
    }
}
