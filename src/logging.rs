//! Log messages in runc's two formats, to standard error or a file.
//!
//! Engines read the last JSON line of `--log` to learn why a command failed, so
//! an error always goes there; without a file it goes to standard error once.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use clap::ValueEnum;
use kuasar_runv_protocol::words::words;
use log::{Level, LevelFilter, Log, Metadata, Record};
use serde_json::json;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

struct Logger {
    format: Format,
    sink: Sink,
}

enum Sink {
    StandardError,
    File(Mutex<File>),
    Bounded(Mutex<Bounded>),
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Sets logging up for a command.
///
/// # Errors
/// When the log file cannot be opened.
pub fn init(file: Option<&Path>, format: Format, debug: bool) -> io::Result<()> {
    let sink = match file {
        None => Sink::StandardError,
        Some(path) => Sink::File(Mutex::new(open(path).map_err(|e| {
            io::Error::new(e.kind(), format!("open {}: {}", path.display(), words(&e)))
        })?)),
    };
    let level = if debug {
        LevelFilter::Debug
    } else {
        LevelFilter::Info
    };
    install(Logger { format, sink }, level);
    Ok(())
}

/// Sets logging up for a sandboxer, whose standard error is its log file
/// ([`create_bounded`]).
pub fn init_sandboxer(debug: bool) {
    let sink = match io::stderr().as_fd().try_clone_to_owned() {
        Ok(file) => Sink::Bounded(Mutex::new(Bounded::new(file.into()))),
        Err(_) => Sink::StandardError,
    };
    let logger = Logger {
        format: Format::Text,
        sink,
    };
    install(
        logger,
        if debug {
            LevelFilter::Debug
        } else {
            LevelFilter::Info
        },
    );
}

fn install(logger: Logger, level: LevelFilter) {
    // A second call changes nothing, and there is none.
    let _ = log::set_logger(LOGGER.get_or_init(|| logger));
    log::set_max_level(level);
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
}

/// The one message of a command that failed: to the log, and to standard error
/// as plain text where the log is elsewhere (as runc).
pub fn fatal(message: &str) {
    log::error!("{message}");
    if LOGGER
        .get()
        .is_some_and(|logger| matches!(logger.sink, Sink::File(_)))
    {
        // There is nowhere left to report to.
        let _ = writeln!(io::stderr(), "{message}");
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Device crates are chatty, and guests make them so.
        metadata.level() <= Level::Warn || metadata.target().starts_with("kuasar_runv")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = format_line(self.format, record);
        // A log that cannot be written must not fail the command.
        let line = line.as_bytes();
        let _ = match &self.sink {
            Sink::StandardError => io::stderr().write_all(line),
            Sink::File(file) => lock(file).write_all(line),
            Sink::Bounded(file) => lock(file).write(line),
        };
    }

    fn flush(&self) {}
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A log of at most [`LIMIT`] bytes, the oldest half of which goes when it is full. It is
/// shortened in place: who writes has only the descriptor.
struct Bounded {
    file: File,
    /// What has been written to it, in bytes.
    len: u64,
}

/// Size of a sandboxer's log, in bytes: a guest causes lines in it.
const LIMIT: u64 = 256 * 1024;

/// Creates the log of a sandboxer, which becomes its standard error.
///
/// # Errors
/// As open(2).
pub fn create_bounded(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

impl Bounded {
    fn new(file: File) -> Bounded {
        let len = file.metadata().map_or(0, |metadata| metadata.len());
        Bounded { file, len }
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.len + line.len() as u64 > LIMIT {
            // Threads of devices may not; another's next line does it for them.
            self.shorten()?;
        }
        self.file.write_all(line)?;
        self.len += line.len() as u64;
        Ok(())
    }

    fn shorten(&mut self) -> io::Result<()> {
        let mut kept = vec![0; LIMIT as usize / 2];
        let from = self.file.metadata()?.len().saturating_sub(LIMIT / 2);
        let read = self.file.read_at(&mut kept, from)?;
        kept.truncate(read);
        let line = kept.iter().position(|byte| *byte == b'\n');
        let start = line.map_or(0, |end| end + 1);
        self.file.set_len(0)?;
        self.len = 0;
        self.file.write_all(&kept[start..])?;
        self.len = (kept.len() - start) as u64;
        Ok(())
    }
}

fn format_line(format: Format, record: &Record<'_>) -> String {
    let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
    let level = match record.level() {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    let message = record.args().to_string();
    match format {
        Format::Json => format!(
            "{}\n",
            json!({"level": level, "msg": message, "time": time})
        ),
        // logrus quotes as Go does; JSON's quoting is the same but for rarities.
        Format::Text => format!("time=\"{time}\" level={level} msg={}\n", json!(message)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bounded_log_keeps_its_newest_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Bounded::new(create_bounded(&path).unwrap());
        let line = |number: u32| format!("line {number} {}\n", "x".repeat(90));
        for number in 0..10_000 {
            log.write(line(number).as_bytes()).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() as u64 <= LIMIT && text.len() as u64 > LIMIT / 3);
        assert_eq!(text.len() as u64, log.len);
        let lines: Vec<_> = text.lines().collect();
        let first = 10_000 - lines.len() as u32;
        for (number, found) in (first..).zip(lines) {
            assert_eq!(format!("{found}\n"), line(number));
        }
    }

    #[test]
    fn both_formats_are_runcs() {
        let line = |format| {
            format_line(
                format,
                &Record::builder()
                    .level(Level::Error)
                    .args(format_args!("exec: \"x\": not found"))
                    .build(),
            )
        };
        let json: serde_json::Value = serde_json::from_str(&line(Format::Json)).unwrap();
        assert_eq!(json["level"], "error");
        assert_eq!(json["msg"], "exec: \"x\": not found");
        let text = line(Format::Text);
        assert!(text.starts_with("time=\"20"), "{text}");
        assert!(
            text.ends_with("level=error msg=\"exec: \\\"x\\\": not found\"\n"),
            "{text}"
        );
    }
}
