//! The bundle: config.json and rootfs, read and checked before anything is made.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kuasar_runv_protocol::words::words;
use oci_spec::runtime::{Capability, Spec};
use serde::Deserialize;
use serde_json::Value;

/// Longest config.json that is read, in bytes. It travels to the guest in one
/// message, and ttrpc's are at most 4 MiB.
const MAX_CONFIG: u64 = 3 << 20;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("chdir {}: {}", path.display(), words(source))]
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
    #[error("invalid rootfs: stat {}: {}", path.display(), words(source))]
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
        let mut json: Value = serde_json::from_slice(&text).map_err(Error::Json)?;
        let unknown = take_unknown_capabilities(&mut json);
        let spec: Spec = if unknown.is_empty() {
            // Again from the text, because only so an error names line and column.
            serde_json::from_slice(&text).map_err(Error::Json)?
        } else {
            // As runc: newer kernels have more than this version knows.
            log::warn!(
                "ignoring unknown or unavailable capabilities: [{}]",
                unknown.join(" ")
            );
            Spec::deserialize(&json).map_err(Error::Json)?
        };
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
    Ok(())
}

/// Takes the capabilities that do not exist out of a configuration, and names
/// each once.
fn take_unknown_capabilities(json: &mut Value) -> Vec<String> {
    let mut unknown = Vec::new();
    let sets = json.pointer_mut("/process/capabilities");
    for set in sets.and_then(Value::as_object_mut).into_iter().flatten() {
        if let Some(list) = set.1.as_array_mut() {
            list.retain(|name| {
                let known = !name.is_string() || Capability::deserialize(name).is_ok();
                if let (false, Some(name)) = (known, name.as_str())
                    && !unknown.iter().any(|seen| seen == name)
                {
                    unknown.push(name.to_owned());
                }
                known
            });
        }
    }
    unknown
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
    fn capabilities_that_do_not_exist_are_left_out() {
        let process = PROCESS.replace(
            "}}",
            r#"},"capabilities":{"bounding":["CAP_KILL","CAP_NOPE"],"effective":["CAP_NOPE"]}}"#,
        );
        let bundle = load(&config("rootfs", &process)).unwrap();
        let sets = &bundle.json["process"]["capabilities"];
        assert_eq!(sets["bounding"], serde_json::json!(["CAP_KILL"]));
        assert_eq!(sets["effective"], serde_json::json!([]));
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
