//! A terminal as a person at it sees it: keys in, a screen out, a size.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::invocation::{Invocation, Running};
use crate::wait::SHORT;

/// The master's side of a pty. Dropping it hangs the terminal up.
pub struct Screen {
    master: File,
    chunks: Receiver<Vec<u8>>,
    seen: String,
}

impl Screen {
    /// Takes over a master.
    ///
    /// # Panics
    /// When there is no descriptor to be had.
    #[must_use]
    pub fn new(master: File) -> Screen {
        let (sender, chunks) = channel();
        let mut reader = master.try_clone().expect("a descriptor");
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            let mut poll = libc::pollfd {
                fd: reader.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            loop {
                // Wakes from time to time, because a read would keep the terminal
                // from hanging up when the screen is dropped.
                // SAFETY: `poll` is one pollfd that outlives the call.
                let ready = unsafe { libc::poll(&raw mut poll, 1, 20) };
                let sent = match ready {
                    0 => sender.send(Vec::new()).is_ok(),
                    // The master reports EIO when the last slave is closed.
                    _ => match reader.read(&mut chunk) {
                        Ok(n @ 1..) => sender.send(chunk[..n].to_vec()).is_ok(),
                        _ => false,
                    },
                };
                if !sent {
                    return;
                }
            }
        });
        Screen {
            master,
            chunks,
            seen: String::new(),
        }
    }

    /// A new terminal of this size, and its slave.
    ///
    /// # Panics
    /// When there is none to be had.
    #[must_use]
    pub fn open(rows: u16, cols: u16) -> (Screen, File) {
        let (master, slave) = Screen::pair(rows, cols);
        (Screen::new(master), slave)
    }

    /// A new terminal of this size: the bare master, and the slave.
    ///
    /// # Panics
    /// When there is none to be had.
    #[must_use]
    pub fn pair(rows: u16, cols: u16) -> (File, File) {
        let (mut master, mut slave) = (0, 0);
        let none = std::ptr::null_mut();
        let mut size = winsize(rows, cols);
        // SAFETY: openpty reads a size and writes two descriptors, which are nobody
        // else's.
        let (master, slave) = unsafe {
            let rc = libc::openpty(
                &raw mut master,
                &raw mut slave,
                none,
                none.cast(),
                &raw mut size,
            );
            assert_eq!(rc, 0, "openpty: {}", io::Error::last_os_error());
            (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave))
        };
        for fd in [&master, &slave] {
            // SAFETY: fcntl takes integers.
            unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
        }
        (master.into(), slave.into())
    }

    /// Types this.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn write(&mut self, text: &str) {
        self.master
            .write_all(text.as_bytes())
            .expect("the terminal is there");
    }

    /// Waits until the screen shows these words, and forgets what it showed up to them.
    ///
    /// # Panics
    /// When they do not come.
    #[track_caller]
    pub fn expect(&mut self, words: &str) {
        assert!(
            self.shows_within(words, SHORT),
            "{words:?} does not come; the screen shows {:?}",
            self.seen
        );
    }

    /// As [`expect`](Self::expect), but says whether they came.
    pub fn shows_within(&mut self, words: &str, deadline: Duration) -> bool {
        let end = Instant::now() + deadline;
        loop {
            if let Some(at) = self.seen.find(words) {
                self.seen.drain(..at + words.len());
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.chunks.recv_timeout(left) {
                Ok(chunk) => self.seen.push_str(&String::from_utf8_lossy(&chunk)),
                Err(_) => return false,
            }
        }
    }

    /// # Panics
    /// When the terminal is gone.
    pub fn resize(&self, rows: u16, cols: u16) {
        let size = winsize(rows, cols);
        // SAFETY: TIOCSWINSZ reads a winsize that outlives the call.
        let rc = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
        assert_eq!(rc, 0, "TIOCSWINSZ: {}", io::Error::last_os_error());
    }
}

/// What a failed test was looking at.
impl Drop for Screen {
    fn drop(&mut self) {
        if thread::panicking() {
            let late = self.chunks.try_iter().flatten().collect::<Vec<_>>();
            self.seen.push_str(&String::from_utf8_lossy(&late));
            eprintln!("the screen shows {:?}", self.seen);
        }
    }
}

fn winsize(rows: u16, cols: u16) -> libc::winsize {
    libc::winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Whether the terminal echoes and edits lines, as it does for a shell.
///
/// # Panics
/// When `terminal` is none.
#[must_use]
pub fn is_cooked(terminal: &File) -> bool {
    // SAFETY: an all-zero termios is a valid value of the C struct.
    let mut mode: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: tcgetattr writes a termios that outlives the call.
    let rc = unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut mode) };
    assert_eq!(rc, 0, "tcgetattr: {}", io::Error::last_os_error());
    let cooked = libc::ECHO | libc::ICANON | libc::ISIG;
    mode.c_lflag & cooked == cooked
}

/// Starts a call as a login would: leader of a session with this terminal, which
/// becomes these of its descriptors.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn spawn_on(slave: &File, targets: &'static [i32], mut call: Invocation) -> Running {
    let fd = slave.as_raw_fd();
    // SAFETY: system calls with integers only, which are async-signal-safe.
    unsafe {
        call.command().pre_exec(move || {
            let done = libc::setsid() >= 0
                && libc::ioctl(fd, libc::TIOCSCTTY, 0) == 0
                && targets.iter().all(|target| libc::dup2(fd, *target) >= 0);
            if done {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        });
    }
    call.spawn()
}
