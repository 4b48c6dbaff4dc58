//! Bounded logs of what a hypervisor process and its guest print.
//!
//! The process writes into a pipe, the sandboxer moves the bytes into a file of
//! the sandbox directory. A guest that prints without end can neither fill the
//! host's file system nor keep the sandboxer busy: the file is rotated at
//! [`LOG_LIMIT`], and a pipe is emptied at most once per [`PERIOD`], so that a
//! faster writer waits for its full pipe. A quiet pipe costs nothing: it is
//! watched for its first byte only, the timer runs from there.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};

/// A log file that reached this size, in bytes, replaces `<name>.1` and starts
/// anew.
const LOG_LIMIT: u64 = 256 * 1024;

/// Shortest time between two readings of a pipe.
pub(super) const PERIOD: Duration = Duration::from_millis(100);

/// Most that is read at once, above the pipe's own capacity of 64 KiB.
const MAX_BATCH: usize = 128 * 1024;
/// End of the output that is kept for messages.
const TAIL: usize = 2048;
/// Longest last line that is quoted in a message, in characters.
const MAX_LINE: usize = 400;

/// One pipe and its log.
pub(super) struct LogPump {
    source: File,
    log: Option<Log>,
    tail: Vec<u8>,
    open: bool,
}

struct Log {
    path: PathBuf,
    file: File,
    len: u64,
}

impl LogPump {
    /// A pump into the file at `path`, or into nothing, and the pipe's writing
    /// end. The file starts empty.
    pub(super) fn new(path: Option<&Path>) -> io::Result<(LogPump, OwnedFd)> {
        let (source, sink) = pipe_with(PipeFlags::CLOEXEC)?;
        // Only this end: the other belongs to a program that expects to block.
        rustix::io::ioctl_fionbio(&source, true)?;
        let pump = LogPump {
            source: source.into(),
            log: path.map(Log::create).transpose()?,
            tail: Vec::new(),
            open: true,
        };
        Ok((pump, sink))
    }

    /// Whether a writing end of the pipe may still be open.
    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// Moves what the pipe holds. A log that cannot be written is given up with
    /// one warning; the pipe is emptied all the same.
    pub(super) fn pump(&mut self) {
        let mut buffer = [0; 16 * 1024];
        let mut left = MAX_BATCH;
        while left > 0 {
            match self.source.read(&mut buffer) {
                Ok(0) => {
                    self.open = false;
                    return;
                }
                Ok(n) => {
                    left = left.saturating_sub(n);
                    self.take(&buffer[..n]);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => {
                    log::warn!("cannot read a log pipe: {e}");
                    self.open = false;
                    return;
                }
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        let excess = self.tail.len().saturating_sub(TAIL);
        self.tail.drain(..excess);
        if let Some(log) = &mut self.log
            && let Err(e) = log.append(bytes)
        {
            log::warn!("cannot write {}: {e}", log.path.display());
            self.log = None;
        }
    }

    /// The last line that is not empty, made safe to print.
    pub(super) fn last_line(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.tail);
        let line = text.lines().map(str::trim).rfind(|line| !line.is_empty())?;
        let printable = line.chars().filter(|c| !c.is_control());
        Some(printable.take(MAX_LINE).collect())
    }
}

impl AsFd for LogPump {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.source.as_fd()
    }
}

impl Log {
    fn create(path: &Path) -> io::Result<Log> {
        Ok(Log {
            path: path.to_owned(),
            file: create_file(path)?,
            len: 0,
        })
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.len + bytes.len() as u64 > LOG_LIMIT {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            std::fs::rename(&self.path, old)?;
            self.file = create_file(&self.path)?;
            self.len = 0;
        }
        self.file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

fn create_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chatty_guest_fills_two_files_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let (mut pump, sink) = LogPump::new(Some(&path)).unwrap();
        let mut sink = File::from(sink);
        let batch = vec![b'x'; 60 * 1024];
        for _ in 0..20 {
            sink.write_all(&batch).unwrap();
            pump.pump();
        }
        sink.write_all(b"\nlast \x1b[2Jwords\r\n\n").unwrap();
        pump.pump();
        let size = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().len();
        assert!(size("console.log") <= LOG_LIMIT);
        assert!(size("console.log.1") <= LOG_LIMIT);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        assert_eq!(pump.last_line().unwrap(), "last [2Jwords");
    }

    #[test]
    fn a_pump_without_a_log_still_empties_the_pipe() {
        let (mut pump, sink) = LogPump::new(None).unwrap();
        let mut sink = File::from(sink);
        for _ in 0..4 {
            sink.write_all(&[b'y'; 64 * 1024]).unwrap();
            pump.pump();
        }
        assert!(pump.is_open());
        drop(sink);
        pump.pump();
        assert!(!pump.is_open());
    }
}
