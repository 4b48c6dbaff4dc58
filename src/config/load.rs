//! Finding, merging and checking the files.
//!
//! Each file is deserialized on its own first: only then do the parser's byte
//! offsets belong to that file, and a mistake gets its line. The tables are then
//! merged and deserialized once more; a single file is parsed once.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

use super::Config;

pub const DEFAULT_PATH: &str = "/etc/kuasar-runv/config.toml";
/// Environment variable that names another configuration file.
pub const CONFIG_ENV: &str = "KUASAR_RUNV_CONFIG";

/// A configuration is a page of text; more is a mistake, such as a device.
const MAX_FILE_BYTES: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// `line` counts from 1.
    #[error("{}:{line}: {message}", path.display())]
    Invalid {
        path: PathBuf,
        line: usize,
        message: String,
    },
}

/// What a missing main file means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    MeansDefaults,
    IsAnError,
}

/// The files there are, in the order in which they are read.
///
/// # Errors
/// See [`Error`].
pub(super) fn files(main: &Path) -> Result<Vec<PathBuf>, Error> {
    let fragments = main.with_file_name("config.d");
    let mut files = fragment_paths(&fragments).map_err(|e| unreadable(&fragments, e))?;
    if main.exists() {
        files.insert(0, main.to_owned());
    }
    Ok(files)
}

pub(super) fn load(main: &Path, missing: Missing) -> Result<Config, Error> {
    let mut files = Vec::new();
    match read(main) {
        Ok(text) => files.push((main.to_owned(), text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound && missing == Missing::MeansDefaults => {}
        Err(source) => return Err(unreadable(main, source)),
    }
    let fragments = main.with_file_name("config.d");
    for path in fragment_paths(&fragments).map_err(|e| unreadable(&fragments, e))? {
        let text = read(&path).map_err(|e| unreadable(&path, e))?;
        files.push((path, text));
    }
    merge(&files)
}

fn unreadable(path: &Path, source: io::Error) -> Error {
    Error::Read {
        path: path.to_owned(),
        source,
    }
}

fn read(path: &Path) -> io::Result<String> {
    use io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("longer than {MAX_FILE_BYTES} bytes"),
        ));
    }
    Ok(text)
}

/// `*.toml` of a directory that may be missing, in lexical order.
fn fragment_paths(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        Err(e) => return Err(e),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|ext| ext == "toml") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn merge(files: &[(PathBuf, String)]) -> Result<Config, Error> {
    let mut merged = DeTable::new();
    let mut config = Config::default();
    for (path, text) in files {
        let table = DeTable::parse(text).map_err(|e| invalid(path, text, None, &e))?;
        config = Config::deserialize(Deserializer::from(table.clone()))
            .map_err(|e| invalid(path, text, Some(table.get_ref()), &e))?;
        overlay(&mut merged, table.into_inner());
    }
    match files {
        [] | [_] => Ok(config),
        [.., (last, _)] => Config::deserialize(Deserializer::from(Spanned::new(0..0, merged)))
            // Unreachable in practice: every value has been accepted above.
            .map_err(|e| Error::Invalid {
                path: last.clone(),
                line: 1,
                message: e.message().to_owned(),
            }),
    }
}

/// Puts the keys of `upper` over those of `base`, table by table.
fn overlay<'i>(base: &mut DeTable<'i>, upper: DeTable<'i>) {
    for (key, value) in upper {
        let (span, value) = (value.span(), value.into_inner());
        match (base.get_mut(&key).map(Spanned::get_mut), value) {
            (Some(DeValue::Table(base)), DeValue::Table(upper)) => overlay(base, upper),
            (_, value) => {
                base.insert(key, Spanned::new(span, value));
            }
        }
    }
}

fn invalid(path: &Path, text: &str, table: Option<&DeTable<'_>>, e: &toml::de::Error) -> Error {
    let unknown = table.and_then(|table| {
        let known = toml::Table::try_from(Config::default()).ok()?;
        unknown_key(table, &known, "")
    });
    let (offset, message) = match (unknown, e.span()) {
        (Some((span, message)), _) => (span.start, message),
        (None, Some(span)) => {
            let key = table.and_then(|table| key_at(table, &span));
            let key = key.map(|key| format!("{key}: ")).unwrap_or_default();
            (span.start, format!("{key}{}", e.message()))
        }
        (None, None) => (0, e.message().to_owned()),
    };
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    Error::Invalid {
        path: path.to_owned(),
        line: 1 + before.iter().filter(|&&byte| byte == b'\n').count(),
        message,
    }
}

/// The first key, in the order of the file, that no default has.
fn unknown_key(
    table: &DeTable<'_>,
    known: &toml::Table,
    section: &str,
) -> Option<(Range<usize>, String)> {
    let unknown = table.iter().filter_map(|(key, value)| {
        let name = key.get_ref().as_ref();
        match (known.get(name), value.get_ref()) {
            (None, _) => Some((key.span(), describe_unknown(name, known, section))),
            (Some(toml::Value::Table(known)), DeValue::Table(table)) => {
                unknown_key(table, known, name)
            }
            _ => None,
        }
    });
    unknown.min_by_key(|(span, _)| span.start)
}

fn describe_unknown(name: &str, known: &toml::Table, section: &str) -> String {
    let place = match section {
        "" => String::new(),
        section => format!(" in [{section}]"),
    };
    let similar = known
        .keys()
        .map(|key| (strsim::damerau_levenshtein(key, name), key))
        .filter(|(distance, _)| *distance <= 1 + name.len() / 4)
        .min();
    match similar {
        Some((_, key)) => format!("unknown key \"{name}\"{place}, did you mean \"{key}\"?"),
        None => {
            let keys: Vec<&str> = known.keys().map(String::as_str).collect();
            format!(
                "unknown key \"{name}\"{place}, there are {}",
                keys.join(", ")
            )
        }
    }
}

/// Dotted name of the innermost key whose value lies at `span`.
fn key_at(table: &DeTable<'_>, span: &Range<usize>) -> Option<String> {
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref();
        if let DeValue::Table(inner) = value.get_ref()
            && let Some(rest) = key_at(inner, span)
        {
            return Some(format!("{name}.{rest}"));
        }
        let place = value.span();
        (place.start <= span.start && span.end <= place.end).then(|| name.to_string())
    })
}
