//! Small JSON records in a private directory under /run.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest record that is read, in bytes.
const MAX_RECORD: u64 = 4096;

/// # Errors
/// Missing, unreadable, or not a record of this type.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let mut text = String::new();
    file.take(MAX_RECORD).read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

/// Replaces a record whole or not at all.
///
/// # Errors
/// Those of the file system; nothing is left behind then.
pub(super) fn write<T: Serialize>(path: &Path, record: &T) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    let temporary = Path::new(&temporary);
    let write = || {
        let mut file = private_file(temporary, true)?;
        serde_json::to_writer(&file, record)?;
        file.write_all(b"\n")?;
        std::fs::rename(temporary, path)
    };
    write().inspect_err(|_| {
        // The error that matters is the first one.
        let _ = std::fs::remove_file(temporary);
    })
}

/// Makes the directory of the records, with its parents.
pub(super) fn make_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// A file of this user, created if need be.
pub(super) fn private_file(path: &Path, truncate: bool) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(truncate)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// Changes with every boot of the host.
pub(super) fn boot_id() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(text.trim().to_owned())
}
