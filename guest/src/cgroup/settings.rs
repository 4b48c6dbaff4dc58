//! Changing limits: all that were asked for, or none.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kuasar_runv_protocol::agent::CgroupSetting;

use super::Cgroup;

/// One limit, see `CgroupSetting` of the protocol.
#[derive(Debug, Clone)]
pub struct Setting {
    /// File names and values, the first file that exists is written.
    pub alternatives: Vec<(String, String)>,
    pub optional: bool,
}

impl From<CgroupSetting> for Setting {
    fn from(setting: CgroupSetting) -> Setting {
        let alternatives = setting.alternatives.into_iter();
        Setting {
            alternatives: alternatives.map(|w| (w.file, w.value)).collect(),
            optional: setting.optional,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SettingError {
    #[error("{0:?} is not the name of a limit")]
    Name(String),
    #[error("the guest's kernel has no {0}")]
    Missing(String),
    #[error("writing {value:?} to {file}: {source}")]
    Write {
        file: String,
        value: String,
        source: io::Error,
    },
}

/// A file that is going to be written, and what it contains now.
struct Change<'a> {
    path: PathBuf,
    file: &'a str,
    value: &'a str,
    /// `None` when the file cannot be read.
    before: Option<String>,
}

impl Cgroup {
    /// Writes limits. Blocks while the kernel reclaims memory.
    ///
    /// # Errors
    /// See [`SettingError`]; what had been written before is written back.
    pub fn apply(&self, settings: &[Setting]) -> Result<(), SettingError> {
        let mut changes = Vec::new();
        for setting in settings {
            changes.extend(find(self.path(), setting)?);
        }
        for (index, change) in changes.iter().enumerate() {
            if let Err(source) = fs::write(&change.path, change.value) {
                changes[..index].iter().rev().for_each(undo);
                return Err(SettingError::Write {
                    file: change.file.to_owned(),
                    value: change.value.to_owned(),
                    source,
                });
            }
        }
        Ok(())
    }
}

fn find<'a>(dir: &Path, setting: &'a Setting) -> Result<Option<Change<'a>>, SettingError> {
    for (file, value) in &setting.alternatives {
        if !is_limit(file) {
            return Err(SettingError::Name(file.clone()));
        }
        let path = dir.join(file);
        if path.is_file() {
            let before = fs::read_to_string(&path).ok();
            return Ok(Some(Change {
                path,
                file,
                value,
                before,
            }));
        }
    }
    match (setting.optional, setting.alternatives.last()) {
        (false, Some((file, _))) => Err(SettingError::Missing(file.clone())),
        _ => Ok(None),
    }
}

/// A file of a controller. Those of the cgroup itself (`cgroup.*`) are the
/// agent's.
pub(crate) fn is_limit(file: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    file.chars().all(plain)
        && file
            .split_once('.')
            .is_some_and(|(controller, _)| !controller.is_empty() && controller != "cgroup")
}

fn undo(change: &Change<'_>) {
    let Some(before) = &change.before else { return };
    // Files with several lines take one at a time; an empty one is emptied by an
    // empty line.
    let lines = if before.trim().is_empty() {
        "\n"
    } else {
        before
    };
    for line in lines.split_inclusive('\n') {
        if let Err(e) = fs::write(&change.path, line) {
            log::warn!("writing {} back: {e}", change.file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(file: &str, value: &str) -> Setting {
        Setting {
            alternatives: vec![(file.into(), value.into())],
            optional: false,
        }
    }

    /// Ordinary files do for what does not depend on the kernel.
    fn cgroup(name: &str) -> Cgroup {
        let path = std::env::temp_dir().join(format!("kuasar-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("pids.max"), "max\n").unwrap();
        Cgroup { path }
    }

    #[test]
    fn the_first_alternative_that_exists_is_written() {
        let cgroup = cgroup("alternative");
        let mut both = setting("pids.none", "1");
        both.alternatives.push(("pids.max".into(), "5".into()));
        cgroup.apply(&[both]).unwrap();
        let file = cgroup.path().join("pids.max");
        assert_eq!(fs::read_to_string(file).unwrap(), "5");
        let mut optional = setting("memory.swap.max", "0");
        assert!(matches!(
            cgroup.apply(&[optional.clone()]),
            Err(SettingError::Missing(_))
        ));
        optional.optional = true;
        cgroup.apply(&[optional]).unwrap();
        fs::remove_dir_all(cgroup.path()).unwrap();
    }

    #[test]
    fn what_fails_is_taken_back() {
        let cgroup = cgroup("back");
        // Writing to a link into nowhere fails, looking at it does not.
        std::os::unix::fs::symlink("/dev/full", cgroup.path().join("pids.full")).unwrap();
        let full = cgroup.path().join("pids.full");
        assert!(!full.is_file());
        let failed = cgroup.apply(&[setting("pids.max", "5"), setting("pids.full", "1")]);
        assert!(matches!(failed, Err(SettingError::Missing(_))));
        let file = cgroup.path().join("pids.max");
        assert_eq!(fs::read_to_string(file).unwrap(), "max\n");
        fs::remove_dir_all(cgroup.path()).unwrap();
    }

    #[test]
    fn only_files_of_controllers_are_limits() {
        for bad in ["cgroup.kill", "../x", "a/b.c", "", ".x", "nodot"] {
            assert!(!is_limit(bad), "{bad}");
        }
        for good in ["memory.swap.max", "hugetlb.2MB.max", "cpu.max"] {
            assert!(is_limit(good), "{good}");
        }
    }
}
