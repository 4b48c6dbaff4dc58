//! Why an operation failed, in one line that a user of runc would understand.
//!
//! libcontainer reports a failure of the container's first process as the text
//! of its outermost error ("failed to prepare rootfs"); what went wrong is only
//! in its log. So the helper collects what libcontainer logs as errors, from all
//! the processes it clones, and appends the first, innermost of them.

use std::fmt::{Debug, Write as _};
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::OnceLock;

use libcontainer::process::channel::ChannelError;
use libcontainer::process::container_main_process::ProcessError;
use nix::errno::Errno;
use tracing_core::field::{Field, Visit};
use tracing_core::span::{Attributes, Id, Record};
use tracing_core::{Dispatch, Event, Interest, Level, LevelFilter, Metadata, Subscriber};

use crate::sys;
use crate::zygote::FailureKind;

/// Longest line kept of one logged error, in bytes.
const MAX_LINE: usize = 2048;
/// Longest message that is answered, in bytes.
const MAX_MESSAGE: usize = 4096;
/// Most that is read of the log, in bytes: what a pipe holds.
const MAX_LOG: u64 = 64 * 1024;
/// Marks the line of a failure that already says everything.
const FINAL: char = '!';

/// A pipe that the helper and its clones write lines into.
static COLLECTOR: OnceLock<(File, File)> = OnceLock::new();

/// What libcontainer puts in front of an error of the container's process. Left
/// out for the reader; nothing depends on it.
const INIT_WRAPPER: &str = "error in executing process : ";

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The spec cannot be honoured.
    #[error("{0}")]
    InvalidSpec(String),
    #[error("{context}: {source}")]
    Io { context: String, source: io::Error },
    #[error("{0}")]
    Other(String),
}

impl Failure {
    pub fn invalid(message: impl Into<String>) -> Failure {
        Failure::InvalidSpec(message.into())
    }

    /// For `map_err`: adds what was being done to an I/O error.
    pub fn io<E: Into<io::Error>>(context: impl Into<String>) -> impl FnOnce(E) -> Failure {
        let context = context.into();
        move |source| Failure::Io {
            context,
            source: source.into(),
        }
    }

    /// The failure libcontainer met, from its error and from what it logged.
    pub fn from_libcontainer(error: &ProcessError) -> Failure {
        let logged = logged();
        if let Some(message) = logged.iter().find_map(|l| l.strip_prefix(FINAL)) {
            return Failure::InvalidSpec(message.to_owned());
        }
        let mut message = String::from("unable to start container process: ");
        match error {
            // Of the container's process: only the outermost text came through.
            ProcessError::Channel(ChannelError::ExecError(text)) => {
                message.push_str("error during container init: ");
                message.push_str(text.strip_prefix(INIT_WRAPPER).unwrap_or(text));
                message.push_str(&innermost(&logged));
            }
            // Of the process between: its texts are complete.
            ProcessError::Channel(ChannelError::OtherError(text)) => message.push_str(text),
            // Of this process, or of one that ended without a word.
            other => {
                message.push_str(&chain(other));
                message.push_str(&innermost(&logged));
            }
        }
        Failure::Other(message)
    }

    pub fn into_parts(self) -> (FailureKind, String) {
        let kind = match self {
            Failure::InvalidSpec(_) => FailureKind::InvalidSpec,
            Failure::Io { .. } | Failure::Other(_) => FailureKind::Internal,
        };
        let mut message = one_line(&self.to_string());
        truncate(&mut message, MAX_MESSAGE);
        (kind, message)
    }
}

/// An error and its causes, outermost first.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut last = error.to_string();
    let mut message = last.clone();
    let mut cause = error.source();
    while let Some(e) = cause {
        let text = e.to_string();
        // Transparent wrappers repeat the text of what they wrap.
        if text != last {
            message.push_str(": ");
            message.push_str(&text);
            last = text;
        }
        cause = e.source();
    }
    message
}

/// Starts collecting what libcontainer logs in this process and those it clones.
///
/// # Errors
/// Of making a pipe.
pub fn start_collecting() -> io::Result<()> {
    let (read, write) = sys::pipe()?;
    // What does not fit is lost, but nobody waits for a reader.
    sys::set_nonblocking(&read)?;
    sys::set_nonblocking(&write)?;
    // A helper calls this once; a second collector would change nothing.
    drop(COLLECTOR.set((read.into(), write.into())));
    drop(tracing_core::dispatcher::set_global_default(Dispatch::new(
        ErrorCollector,
    )));
    Ok(())
}

/// Records the one message the user is to see, from inside the container.
pub fn record_final(message: &str) {
    record(&format!("{FINAL}{message}"));
}

fn record(line: &str) {
    let mut line = one_line(line);
    truncate(&mut line, MAX_LINE);
    line.push('\n');
    if let Some((_, file)) = COLLECTOR.get() {
        // Without it the outermost error is still reported.
        drop((&*file).write_all(line.as_bytes()));
    }
}

fn logged() -> Vec<String> {
    let mut bytes = Vec::new();
    if let Some((file, _)) = COLLECTOR.get() {
        // Ends with the error of an empty pipe: other processes have the other
        // end as well.
        drop(file.take(MAX_LOG).read_to_end(&mut bytes));
    }
    let text = String::from_utf8_lossy(&bytes);
    text.lines().map(str::to_owned).collect()
}

/// The first error that was logged, with the reason if only later ones have it.
fn innermost(logged: &[String]) -> String {
    let Some(first) = logged.first() else {
        return String::new();
    };
    let mut text = format!(": {}", tidy(&spell_out_errnos(first)));
    let reason = logged.iter().find_map(|line| first_errno(line));
    if let Some(reason) = reason.map(words)
        && !text.contains(&reason)
    {
        text.push_str(": ");
        text.push_str(&reason);
    }
    text
}

fn first_errno(line: &str) -> Option<Errno> {
    line.split(|c: char| !c.is_ascii_alphanumeric())
        .find_map(errno_by_name)
}

fn words(errno: Errno) -> String {
    kuasar_runv_protocol::words::words(&errno.into())
}

/// Takes `Some(...)` and absent fields out of a `Debug` text.
fn tidy(text: &str) -> String {
    let mut parts: Vec<&str> = text.split(", ").collect();
    let last = parts.pop().unwrap_or_default();
    parts.retain(|part| !part.ends_with(": None"));
    let last_is_absent = last.contains(": None }");
    let mut out = parts.join(", ");
    if last_is_absent {
        out.push_str(last.split_once(": None").map_or("", |(_, rest)| rest));
    } else {
        if !out.is_empty() {
            out.push_str(", ");
        }
        out.push_str(last);
    }
    while let Some(start) = out.find("Some(") {
        let inner = start + "Some(".len();
        let mut depth = 1;
        let end = out[inner..].find(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            depth == 0
        });
        if let Some(end) = end {
            out.remove(inner + end);
        }
        out.replace_range(start..inner, "");
    }
    out
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn truncate(text: &mut String, max: usize) {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

/// Adds the usual words behind each errno name of a `Debug` text: callers of an
/// OCI runtime look for "no such file or directory" and its like.
fn spell_out_errnos(text: &str) -> String {
    let mut out = String::new();
    let mut word = String::new();
    for c in text.chars().chain(std::iter::once(' ')) {
        if c.is_ascii_alphanumeric() {
            word.push(c);
            continue;
        }
        match errno_by_name(&word) {
            Some(errno) => out.push_str(&words(errno)),
            None => out.push_str(&word),
        }
        word.clear();
        out.push(c);
    }
    out.truncate(out.trim_end().len());
    out
}

fn errno_by_name(name: &str) -> Option<Errno> {
    const LAST: i32 = 133;
    if !name.starts_with('E') || name.len() < 4 {
        return None;
    }
    (1..=LAST)
        .map(Errno::from_raw)
        .find(|e| *e != Errno::UnknownErrno && format!("{e:?}") == name)
}

/// Keeps the errors and turns everything else off.
struct ErrorCollector;

impl Subscriber for ErrorCollector {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR && metadata.is_event()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::ERROR)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        record(&(line.message + &line.fields));
    }

    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            "err" | "error" | "e" | "ret" => write!(self.fields, ": {value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_names_become_words() {
        assert_eq!(
            spell_out_errnos("failed to chdir: Nix(ENOENT)"),
            "failed to chdir: Nix(no such file or directory)"
        );
        assert_eq!(spell_out_errnos("EXIT Early E"), "EXIT Early E");
    }

    #[test]
    fn debug_texts_lose_what_is_absent() {
        assert_eq!(
            tidy(r#"failed Mount { to: "/x", typ: Some("t(1)"), opt: None, gid: None }: syscall"#),
            r#"failed Mount { to: "/x", typ: "t(1)" }: syscall"#
        );
        assert_eq!(tidy("plain, text"), "plain, text");
    }

    #[test]
    fn the_reason_is_taken_from_where_it_is() {
        let logged = ["cannot mount: syscall", "no rootfs: Mount(Nix(ENODEV))"];
        let logged: Vec<_> = logged.map(str::to_owned).to_vec();
        assert_eq!(
            innermost(&logged),
            ": cannot mount: syscall: no such device"
        );
        assert_eq!(innermost(&[]), "");
    }

    #[test]
    fn a_message_is_one_bounded_line() {
        let (kind, message) = Failure::invalid(format!("a\nb {}", "é".repeat(5000))).into_parts();
        assert_eq!(kind, FailureKind::InvalidSpec);
        assert!(message.starts_with("a b é"));
        assert!(message.len() <= MAX_MESSAGE);
    }
}
