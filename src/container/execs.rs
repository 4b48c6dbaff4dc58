//! Which execs of a container there are: one empty file each in
//! `containers/<id>/execs`, named after its stand-in.
//!
//! A file is there before its stand-in does anything, and goes when somebody who
//! looks finds that the stand-in has ended: the stand-in itself can reach nothing
//! of the host. Adding one takes a shared lock of the directory, so that execs do
//! not wait for each other; `delete` takes the exclusive one and keeps it.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::{Error, context};
use crate::root::{self, Root};
use crate::sys::lock::DirLock;
use crate::sys::process::ProcessRef;

/// How long adding an exec waits for a `delete` that holds the directory, and
/// `delete` for execs that are being added.
const LOCK_DEADLINE: Duration = Duration::from_secs(60);

fn dir(root: &Root, id: &str) -> PathBuf {
    root.container(id).join("execs")
}

fn name_of(standin: ProcessRef) -> String {
    format!("{}.{}", standin.pid, standin.start_time)
}

fn parse(name: &str) -> Option<ProcessRef> {
    let (pid, start_time) = name.split_once('.')?;
    Some(ProcessRef {
        pid: pid.parse().ok()?,
        start_time: start_time.parse().ok()?,
    })
}

/// Makes the directory of a new container.
///
/// # Errors
/// As mkdir(2).
pub fn prepare(root: &Root, id: &str) -> Result<(), Error> {
    let dir = dir(root, id);
    root::create_private_dir(&dir).map_err(context(format!("making {}", dir.display())))
}

/// An exec on record; taken off it when dropped, unless kept.
#[derive(Debug)]
pub struct ExecRecord {
    path: PathBuf,
    kept: bool,
}

impl ExecRecord {
    /// Leaves the record to whoever finds that its stand-in has ended.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for ExecRecord {
    fn drop(&mut self) {
        if !self.kept {
            // `delete` may have been here.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Puts an exec on record.
///
/// # Errors
/// [`Error::NotFound`] when the container is being deleted.
pub fn add(root: &Root, id: &str, standin: ProcessRef) -> Result<ExecRecord, Error> {
    let dir = dir(root, id);
    let gone = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => Error::NotFound,
        io::ErrorKind::TimedOut => Error::Busy,
        _ => context("recording the exec")(e),
    };
    let _lock = DirLock::acquire_shared(&dir, LOCK_DEADLINE).map_err(gone)?;
    let path = dir.join(name_of(standin));
    File::create(&path).map_err(gone)?;
    Ok(ExecRecord { path, kept: false })
}

/// The stand-ins of the execs that run. Records of others are removed.
///
/// # Errors
/// As readdir(3); none for a container that is gone.
pub fn running(root: &Root, id: &str) -> Result<Vec<ProcessRef>, Error> {
    let dir = dir(root, id);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(context(format!("reading {}", dir.display()))(e)),
    };
    let mut running = Vec::new();
    for entry in entries.flatten() {
        let standin = entry.file_name().to_str().and_then(parse);
        match standin.filter(|s| s.is_alive()) {
            Some(standin) => running.push(standin),
            None => {
                // Others look too.
                let _ = fs::remove_file(entry.path());
            }
        }
    }
    Ok(running)
}

/// Keeps execs from being added, and ends those there are. With `same_boot` false
/// they ended with an earlier boot.
///
/// # Errors
/// A stand-in that does not end.
pub fn end_all(
    root: &Root,
    id: &str,
    same_boot: bool,
    deadline: Duration,
) -> Result<Option<DirLock>, Error> {
    let lock = match DirLock::acquire(&dir(root, id), LOCK_DEADLINE) {
        Ok(lock) => lock,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(context("locking the execs")(e)),
    };
    if same_boot {
        let standins = running(root, id)?;
        let failed = || context("killing the stand-in of an exec");
        for standin in &standins {
            standin
                .signal(rustix::process::Signal::KILL)
                .map_err(failed())?;
        }
        for standin in standins {
            standin.kill(deadline).map_err(failed())?;
        }
    }
    Ok(Some(lock))
}

/// Removes the directory. The caller has the lock [`end_all`] returned.
///
/// # Errors
/// As unlink(2) and rmdir(2).
pub fn remove_dir(root: &Root, id: &str) -> Result<(), Error> {
    let dir = dir(root, id);
    root::remove_private_dir(&dir).map_err(context(format!("removing {}", dir.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn container() -> (tempfile::TempDir, Root) {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::new(Some(tmp.path().to_owned()));
        root.create().unwrap();
        root::create_private_dir(&root.container("c")).unwrap();
        prepare(&root, "c").unwrap();
        (tmp, root)
    }

    #[test]
    fn only_what_runs_is_listed_and_the_rest_forgotten() {
        let (_tmp, root) = container();
        let me = ProcessRef::current().unwrap();
        let ended = ProcessRef {
            start_time: 1,
            ..me
        };
        add(&root, "c", me).unwrap().keep();
        add(&root, "c", ended).unwrap().keep();
        assert_eq!(running(&root, "c").unwrap(), [me]);
        assert_eq!(fs::read_dir(dir(&root, "c")).unwrap().count(), 1);
        drop(add(&root, "c", ended).unwrap());
        assert_eq!(fs::read_dir(dir(&root, "c")).unwrap().count(), 1);
        assert!(running(&root, "other").unwrap().is_empty());
    }

    #[test]
    fn nothing_is_added_once_a_delete_has_begun() {
        let (_tmp, root) = container();
        let mut sleeper = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let standin = ProcessRef::of(i32::try_from(sleeper.id()).unwrap()).unwrap();
        add(&root, "c", standin).unwrap().keep();
        let lock = end_all(&root, "c", true, Duration::from_secs(5)).unwrap();
        assert!(!standin.is_alive());
        sleeper.wait().unwrap();
        let adding = {
            let root = root.clone();
            std::thread::spawn(move || add(&root, "c", ProcessRef::current().unwrap()))
        };
        remove_dir(&root, "c").unwrap();
        drop(lock);
        assert!(matches!(adding.join().unwrap(), Err(Error::NotFound)));
    }
}
