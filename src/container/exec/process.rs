//! The process of an exec: a file (`--process`), or the one of the bundle's
//! config.json with changes from the command line. The rules and the words are
//! those of runc 1.1.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use kuasar_runv_protocol::words::words;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::container::labels;

/// Longest file that is read, in bytes; the process travels in one message, and
/// ttrpc's are at most 4 MiB.
const MAX_FILE: u64 = 3 << 20;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("open {}: {}", path.display(), words(source))]
    Open { path: PathBuf, source: io::Error },
    #[error("{} is longer than {MAX_FILE} bytes", .0.display())]
    TooLong(PathBuf),
    #[error("{}: {source}", path.display())]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{0}")]
    Invalid(String),
}

fn invalid<T>(message: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid(message.into()))
}

/// Where the process comes from.
#[derive(Debug)]
pub enum Source {
    /// A process.json.
    File(PathBuf),
    CommandLine(Changes),
}

/// What the command line changes of the bundle's process.
#[derive(Debug, Default)]
pub struct Changes {
    pub args: Vec<String>,
    pub cwd: Option<String>,
    pub env: Vec<String>,
    pub terminal: bool,
    /// `uid[:gid]`
    pub user: Option<String>,
    pub additional_gids: Vec<i64>,
    pub process_label: Option<String>,
    pub apparmor: Option<String>,
    pub no_new_privileges: Option<bool>,
    pub capabilities: Vec<String>,
}

impl Source {
    /// The process, complete and checked. `bundle` is the container's.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn load(&self, bundle: &Path) -> Result<Value, Error> {
        let mut process = match self {
            Source::File(path) => parse(path)?,
            Source::CommandLine(changes) if changes.args.is_empty() => {
                return invalid("process args cannot be empty");
            }
            Source::CommandLine(changes) => {
                #[derive(Deserialize)]
                struct Config {
                    #[serde(default)]
                    process: Value,
                }
                let Config { mut process } = parse(&bundle.join("config.json"))?;
                check_shape(&process)?;
                changes.apply(&mut process)?;
                process
            }
        };
        check_shape(&process)?;
        complete(&mut process)?;
        Ok(process)
    }
}

/// What is changed below has to be what it should be.
fn check_shape(process: &Value) -> Result<(), Error> {
    if !process.is_object() {
        return invalid("process property must not be empty");
    }
    for key in ["user", "capabilities"] {
        match &process[key] {
            Value::Null | Value::Object(_) => {}
            _ => return invalid(format!("process.{key} is not an object")),
        }
    }
    Ok(())
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let failed = |source| Error::Open {
        path: path.to_owned(),
        source,
    };
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut text))
        .map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(Error::TooLong(path.to_owned()));
    }
    serde_json::from_slice(&text).map_err(|source| Error::Json {
        path: path.to_owned(),
        source,
    })
}

impl Changes {
    fn apply(&self, process: &mut Value) -> Result<(), Error> {
        process["args"] = json!(self.args);
        process["terminal"] = json!(self.terminal);
        for (key, value) in [
            ("cwd", &self.cwd),
            ("apparmorProfile", &self.apparmor),
            ("selinuxLabel", &self.process_label),
        ] {
            if let Some(value) = value.as_ref().filter(|v| !v.is_empty()) {
                process[key] = json!(value);
            }
        }
        if let Some(set) = self.no_new_privileges {
            process["noNewPrivileges"] = json!(set);
        }
        // CVE-2022-29162: not the inheritable ones.
        for set in ["bounding", "effective", "permitted", "ambient"] {
            append(process, &["capabilities", set], &self.capabilities);
        }
        append(process, &["env"], &self.env);
        self.apply_user(process)
    }

    fn apply_user(&self, process: &mut Value) -> Result<(), Error> {
        if let Some(user) = self.user.as_ref().filter(|u| !u.is_empty()) {
            let (uid, gid) = match user.split_once(':') {
                Some((uid, gid)) => (uid, Some(gid)),
                None => (user.as_str(), None),
            };
            if let Some(gid) = gid {
                process["user"]["gid"] = json!(number(gid, "gid")?);
            }
            process["user"]["uid"] = json!(number(uid, "uid")?);
        }
        for gid in &self.additional_gids {
            if u32::try_from(*gid).is_err() {
                return invalid(format!("additional-gids must be a positive number {gid}"));
            }
        }
        append(process, &["user", "additionalGids"], &self.additional_gids);
        Ok(())
    }
}

fn number(text: &str, what: &str) -> Result<u32, Error> {
    text.parse().map_err(|_| {
        Error::Invalid(format!(
            "parsing {text} as int for {what} failed: strconv.Atoi: parsing {text:?}: invalid syntax"
        ))
    })
}

/// Appends to a list of an object, making what is missing.
fn append<T: Clone + Into<Value>>(object: &mut Value, path: &[&str], items: &[T]) {
    if items.is_empty() {
        return;
    }
    let mut list = object;
    for key in path {
        list = &mut list[*key];
    }
    if !list.is_array() {
        *list = json!([]);
    }
    if let Some(list) = list.as_array_mut() {
        list.extend(items.iter().cloned().map(Into::into));
    }
}

/// Checks what runc checks, and completes what the guest expects.
fn complete(process: &mut Value) -> Result<(), Error> {
    let Some(fields) = process.as_object_mut() else {
        return invalid("process property must not be empty");
    };
    let text = |key: &str| fields.get(key).and_then(Value::as_str).unwrap_or_default();
    let cwd = text("cwd");
    if cwd.is_empty() {
        return invalid("Cwd property must not be empty");
    }
    if !cwd.starts_with('/') {
        return invalid("Cwd must be an absolute path");
    }
    if fields
        .get("args")
        .and_then(Value::as_array)
        .is_none_or(Vec::is_empty)
    {
        return invalid("args must not be empty");
    }
    labels::check_selinux(Some(text("selinuxLabel")))
        .and_then(|()| labels::check_apparmor(Some(text("apparmorProfile"))))
        .map_err(|e| Error::Invalid(e.to_string()))?;
    labels::strip(process);
    for id in ["uid", "gid"] {
        let id = &mut process["user"][id];
        if id.is_null() {
            *id = json!(0);
        }
    }
    keep_known_capabilities(&mut process["capabilities"]);
    if process["capabilities"].is_null()
        && let Some(fields) = process.as_object_mut()
    {
        fields.remove("capabilities");
    }
    Ok(())
}

/// Takes unknown capabilities out, with runc's warning.
fn keep_known_capabilities(capabilities: &mut Value) {
    let mut unknown: Vec<String> = Vec::new();
    for list in capabilities.as_object_mut().into_iter().flatten() {
        let Some(list) = list.1.as_array_mut() else {
            continue;
        };
        list.retain(|name| {
            let name = name.as_str().unwrap_or_default();
            let is_known = CAPABILITIES
                .split_whitespace()
                .any(|c| Some(c) == name.strip_prefix("CAP_"));
            if !is_known && !unknown.iter().any(|u| u == name) {
                unknown.push(name.to_owned());
            }
            is_known
        });
    }
    if !unknown.is_empty() {
        log::warn!(
            "ignoring unknown or unavailable capabilities: [{}]",
            unknown.join(" ")
        );
    }
}

/// capabilities(7), as of Linux 5.9.
const CAPABILITIES: &str = "AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF \
    CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL \
    LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST \
    NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE \
    SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG SYSLOG \
    WAKE_ALARM";

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({
            "process": {
                "terminal": true,
                "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
                "args": ["sh"],
                "env": ["A=1"],
                "cwd": "/home",
                "capabilities": {"bounding": ["CAP_KILL"], "inheritable": ["CAP_KILL"]},
                "noNewPrivileges": true,
            },
            "linux": {"any": "thing"},
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        dir
    }

    fn load(changes: Changes) -> Result<Value, String> {
        let changes = Changes {
            args: vec!["id".into()],
            ..changes
        };
        Source::CommandLine(changes)
            .load(bundle().path())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_not_given_is_the_bundles() {
        let process = load(Changes::default()).unwrap();
        assert_eq!(process["args"], json!(["id"]));
        assert_eq!(process["terminal"], json!(false));
        assert_eq!(process["cwd"], json!("/home"));
        assert_eq!(process["user"]["uid"], json!(1));
        assert_eq!(process["noNewPrivileges"], json!(true));
    }

    #[test]
    fn what_is_given_is_changed_or_appended() {
        let process = load(Changes {
            cwd: Some("/tmp".into()),
            env: vec!["B=2".into()],
            terminal: true,
            user: Some("5:6".into()),
            additional_gids: vec![7],
            no_new_privileges: Some(false),
            capabilities: vec!["CAP_SYS_ADMIN".into(), "FOO".into()],
            ..Changes::default()
        })
        .unwrap();
        assert_eq!(process["cwd"], json!("/tmp"));
        assert_eq!(process["env"], json!(["A=1", "B=2"]));
        assert_eq!(process["terminal"], json!(true));
        assert_eq!(
            process["user"],
            json!({"uid": 5, "gid": 6, "additionalGids": [3, 7]})
        );
        assert_eq!(process["noNewPrivileges"], json!(false));
        let capabilities = &process["capabilities"];
        assert_eq!(
            capabilities["bounding"],
            json!(["CAP_KILL", "CAP_SYS_ADMIN"])
        );
        assert_eq!(capabilities["ambient"], json!(["CAP_SYS_ADMIN"]));
        assert_eq!(capabilities["inheritable"], json!(["CAP_KILL"]));
    }

    #[test]
    fn mistakes_have_runcs_words() {
        let cases = [
            (
                Changes {
                    user: Some("a".into()),
                    ..Changes::default()
                },
                "parsing a as int for uid failed: strconv.Atoi: parsing \"a\": invalid syntax",
            ),
            (
                Changes {
                    user: Some("1:b".into()),
                    ..Changes::default()
                },
                "parsing b as int for gid failed",
            ),
            (
                Changes {
                    additional_gids: vec![-3],
                    ..Changes::default()
                },
                "additional-gids must be a positive number -3",
            ),
            (
                Changes {
                    cwd: Some("rel".into()),
                    ..Changes::default()
                },
                "Cwd must be an absolute path",
            ),
        ];
        for (changes, words) in cases {
            let message = load(changes).unwrap_err();
            assert!(message.contains(words), "{message}");
        }
        let none = Source::CommandLine(Changes::default()).load(Path::new("/"));
        assert_eq!(
            none.unwrap_err().to_string(),
            "process args cannot be empty"
        );
    }

    #[test]
    fn a_file_is_complete_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("process.json");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Source::File(path.clone())
                .load(Path::new("/"))
                .map_err(|e| e.to_string())
        };
        let process = load(r#"{"cwd":"/","args":["id"]}"#).unwrap();
        assert_eq!(process["user"], json!({"uid": 0, "gid": 0}));
        assert!(process.get("capabilities").is_none());
        assert_eq!(load("{}").unwrap_err(), "Cwd property must not be empty");
        assert_eq!(
            load(r#"{"cwd":"/"}"#).unwrap_err(),
            "args must not be empty"
        );
        assert_eq!(
            load("[]").unwrap_err(),
            "process property must not be empty"
        );
        let odd = r#"{"cwd":"/","args":["id"],"user":"me"}"#;
        assert_eq!(load(odd).unwrap_err(), "process.user is not an object");
        assert!(load("{").unwrap_err().contains("line 1"));
        let missing = Source::File("/nope".into())
            .load(Path::new("/"))
            .unwrap_err();
        assert_eq!(missing.to_string(), "open /nope: no such file or directory");
    }
}
