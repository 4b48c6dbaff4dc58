//! The state directory (`--root`) and what lies where in it.
//!
//! ```text
//! <root>/containers/<id>/state.json   one container; the directory is its lock
//! <root>/sandboxes/<id>/sandbox.json  one pod's VM; the directory is its lock
//!                       control.sock  the sandboxer
//!                       vsock.sock    the guest's vsock ports
//!                       share/        mount point of the shared directory, seen
//!                                     filled only in the sandboxer's mount namespace
//!                       *.log         sandboxer, hypervisor, guest console
//! ```
//!
//! Everything is 0700. Container ids are checked before they become a path.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Default of `--root` for root (without root: below `XDG_RUNTIME_DIR`).
const DEFAULT: &str = "/run/kuasar-runv";

/// A state directory. It need not exist to be read from.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// `--root`, or the default of this user.
    #[must_use]
    pub fn new(given: Option<PathBuf>) -> Root {
        Root(given.unwrap_or_else(default_path))
    }

    /// The directory for what is known of this machine, whatever `--root` is. It
    /// need not exist.
    #[must_use]
    pub fn machine_path() -> PathBuf {
        default_path()
    }

    /// Makes and names [`machine_path`](Self::machine_path).
    ///
    /// # Errors
    /// As mkdir(2).
    pub fn of_machine() -> io::Result<PathBuf> {
        let path = Self::machine_path();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)?;
        Ok(path)
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    #[must_use]
    pub fn containers(&self) -> PathBuf {
        self.0.join("containers")
    }

    #[must_use]
    pub fn container(&self, id: &str) -> PathBuf {
        self.containers().join(id)
    }

    #[must_use]
    pub fn sandboxes(&self) -> PathBuf {
        self.0.join("sandboxes")
    }

    #[must_use]
    pub fn sandbox(&self, id: &str) -> PathBuf {
        self.sandboxes().join(id)
    }

    /// Makes the directories above containers and sandboxes.
    ///
    /// # Errors
    /// As mkdir(2).
    pub fn create(&self) -> io::Result<()> {
        for dir in [self.containers(), self.sandboxes()] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)?;
        }
        Ok(())
    }
}

/// The variables of the environment that the default depends on.
pub fn environment() -> impl Iterator<Item = (&'static str, OsString)> {
    ["XDG_RUNTIME_DIR", "USER"]
        .into_iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)))
}

fn default_path() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() && is_rootless() => Path::new(&dir).join("kuasar-runv"),
        _ => DEFAULT.into(),
    }
}

/// Whether this is no root, or the root of an engine's user namespace (rootless
/// podman), which is an ordinary account outside. Root in a container that was
/// given root's name is root, as with runc.
#[must_use]
pub fn is_rootless() -> bool {
    if !nix::unistd::geteuid().is_root() {
        return true;
    }
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    !maps_everything(&map) && std::env::var_os("USER").is_none_or(|user| user != "root")
}

/// Whether a uid_map (user_namespaces(7)) is that of the initial namespace.
fn maps_everything(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Makes one directory with mode 0700.
///
/// # Errors
/// `AlreadyExists`, else as mkdir(2).
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path)
}

/// Removes a directory of ours. It is flat but for empty sub-directories, and
/// nothing else is ever removed: should a mount of the user's ever be below it,
/// this fails with `ENOTEMPTY` or `EBUSY` and the user's files stay.
///
/// # Errors
/// As unlink(2) and rmdir(2). A directory that is not there is no error.
pub fn remove_private_dir(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_initial_user_namespace_is_told_by_its_map() {
        assert!(maps_everything("         0          0 4294967295\n"));
        assert!(!maps_everything("         0       1000          1\n"));
        assert!(!maps_everything("0 1000 1\n1 100000 65536\n"));
        assert!(!maps_everything(""));
    }

    #[test]
    fn only_flat_directories_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("s1");
        create_private_dir(&dir).unwrap();
        fs::create_dir(dir.join("share")).unwrap();
        fs::write(dir.join("sandbox.json"), "{}").unwrap();
        fs::write(dir.join("share/users-file"), "precious").unwrap();
        assert!(remove_private_dir(&dir).is_err());
        assert!(dir.join("share/users-file").exists());
        fs::remove_file(dir.join("share/users-file")).unwrap();
        remove_private_dir(&dir).unwrap();
        assert!(!dir.exists());
        remove_private_dir(&dir).unwrap();
    }
}
