//! The bundle: config.json and rootfs, read and checked before anything is made.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use serde_json::Value;

/// Longest config.json that is read, in bytes. It travels to the guest in one
/// message, and ttrpc's are at most 4 MiB.
const MAX_CONFIG: u64 = 3 << 20;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("chdir {}: {source}", path.display())]
    NoBundle { path: PathBuf, source: io::Error },
    #[error("JSON specification file config.json not found")]
    NoConfig,
    #[error("reading config.json: {0}")]
    Read(io::Error),
    #[error("config.json is longer than {MAX_CONFIG} bytes")]
    TooLong,
    #[error("config.json is not valid: {0}")]
    Json(serde_json::Error),
    #[error("config.json: {0}")]
    Invalid(&'static str),
    #[error("config.json: unsupported ociVersion {0:?}, only 1.x is supported")]
    Version(String),
    #[error("invalid rootfs: stat {}: {source}", path.display())]
    NoRootfs { path: PathBuf, source: io::Error },
    #[error("invalid rootfs: {} is not a directory", .0.display())]
    RootfsNotDirectory(PathBuf),
}

/// A bundle that can be made into a container.
#[derive(Debug)]
pub struct Bundle {
    /// Absolute.
    pub path: PathBuf,
    /// Absolute, without symbolic links.
    pub rootfs: PathBuf,
    pub spec: Spec,
    /// The same as read, with fields this version does not know.
    pub json: Value,
}

impl Bundle {
    /// # Errors
    /// See [`Error`].
    pub fn load(path: &Path) -> Result<Bundle, Error> {
        let path = path.canonicalize().map_err(|source| Error::NoBundle {
            path: path.to_owned(),
            source,
        })?;
        let config = path.join("config.json");
        let text = match fs::metadata(&config) {
            Ok(meta) if meta.len() > MAX_CONFIG => return Err(Error::TooLong),
            Ok(_) => fs::read(&config).map_err(Error::Read)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Error::NoConfig),
            Err(e) => return Err(Error::Read(e)),
        };
        let json: Value = serde_json::from_slice(&text).map_err(Error::Json)?;
        // Again from the text, because only so an error names line and column.
        let spec: Spec = serde_json::from_slice(&text).map_err(Error::Json)?;
        check(&spec)?;
        let rootfs = rootfs(&path, &spec)?;
        Ok(Bundle {
            path,
            rootfs,
            spec,
            json,
        })
    }
}

fn check(spec: &Spec) -> Result<(), Error> {
    if !spec.version().starts_with("1.") {
        return Err(Error::Version(spec.version().clone()));
    }
    let process = spec
        .process()
        .as_ref()
        .ok_or(Error::Invalid("process property must not be empty"))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::Invalid("args must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::Invalid("Cwd must be an absolute path"));
    }
    if spec.linux().is_none() {
        return Err(Error::Invalid("linux property must not be empty"));
    }
    for mount in spec.mounts().iter().flatten() {
        if !mount.destination().is_absolute() {
            return Err(Error::Invalid("mount destination must be an absolute path"));
        }
    }
    Ok(())
}

fn rootfs(bundle: &Path, spec: &Spec) -> Result<PathBuf, Error> {
    let root = spec
        .root()
        .as_ref()
        .ok_or(Error::Invalid("Root must be specified"))?;
    let path = bundle.join(root.path());
    let rootfs = path.canonicalize().map_err(|source| Error::NoRootfs {
        path: path.clone(),
        source,
    })?;
    if !rootfs.is_dir() {
        return Err(Error::RootfsNotDirectory(path));
    }
    Ok(rootfs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(config: &str) -> Result<Bundle, Error> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        Bundle::load(dir.path())
    }

    fn config(root: &str, process: &str) -> String {
        format!(
            r#"{{"ociVersion":"1.0.2","root":{{"path":"{root}"}},"process":{process},"linux":{{}}}}"#
        )
    }

    const PROCESS: &str = r#"{"cwd":"/","args":["true"],"user":{"uid":0,"gid":0}}"#;

    #[test]
    fn a_sound_bundle_is_read() {
        let bundle = load(&config("rootfs", PROCESS)).unwrap();
        assert!(bundle.rootfs.ends_with("rootfs"));
        assert!(bundle.rootfs.is_absolute());
    }

    #[test]
    fn each_mistake_is_named() {
        let missing = Bundle::load(Path::new("/no/such/bundle")).unwrap_err();
        assert!(missing.to_string().contains("/no/such/bundle"));
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(Bundle::load(empty.path()), Err(Error::NoConfig)));
        let cases = [
            ("{".to_owned(), "line 1"),
            (config("nowhere", PROCESS), "invalid rootfs"),
            (config("config.json", PROCESS), "not a directory"),
            (
                config(
                    "rootfs",
                    r#"{"cwd":"/","args":[],"user":{"uid":0,"gid":0}}"#,
                ),
                "args must not be empty",
            ),
            (
                config(
                    "rootfs",
                    r#"{"cwd":"x","args":["a"],"user":{"uid":0,"gid":0}}"#,
                ),
                "Cwd must be an absolute path",
            ),
            (
                config("rootfs", PROCESS).replace("1.0.2", "2.0.0"),
                "unsupported ociVersion",
            ),
        ];
        for (text, expected) in cases {
            let message = load(&text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
