//! Log messages in runc's two formats, to standard error or a file.
//!
//! Engines read the last JSON line of `--log` to learn why a command failed, so
//! an error always goes there; without a file it goes to standard error once.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

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
    /// `None`: standard error.
    file: Option<Mutex<File>>,
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Sets logging up for a command.
///
/// # Errors
/// When the log file cannot be opened.
pub fn init(file: Option<&Path>, format: Format, debug: bool) -> io::Result<()> {
    let file = match file {
        None => None,
        Some(path) => Some(Mutex::new(open(path).map_err(|e| {
            io::Error::new(e.kind(), format!("open {}: {}", path.display(), words(&e)))
        })?)),
    };
    let level = if debug {
        LevelFilter::Debug
    } else {
        LevelFilter::Info
    };
    install(Logger { format, file }, level);
    Ok(())
}

/// Sets logging up for a sandboxer, whose standard error is its log file.
pub fn init_sandboxer(debug: bool) {
    let logger = Logger {
        format: Format::Text,
        file: None,
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
    if LOGGER.get().is_some_and(|logger| logger.file.is_some()) {
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
        let _ = match &self.file {
            None => io::stderr().write_all(line.as_bytes()),
            Some(file) => file
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
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
