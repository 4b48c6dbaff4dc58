//! Telling the host's kernel that a container ran out of memory in the guest.
//!
//! Engines learn of that from the container's cgroup on the host: conmon and
//! containerd's shim wait for its notifications (an eventfd at `memory.oom_control`,
//! changes of `memory.events`), and nobody but the kernel can make those. So a
//! process made for it, the [`victim`], takes memory in that cgroup until the kernel
//! kills it there.
//!
//! The limit of the cgroup is lowered for the moment to little more than what is
//! used, so that this costs milliseconds and no memory. Nobody else is at risk:
//!
//! * The VM's processes are in another cgroup meanwhile, [`Aside`]. What they have
//!   taken before stays accounted to the container.
//! * Stand-ins take no memory then, and the kernel prefers the victim: it uses more
//!   than they do, and its `oom_score_adj` is the highest there is.
//! * Nothing is swapped out for it. Clean page cache of the cgroup may be dropped.
//!
//! What cannot be put back, a limit that stays low, leaves the VM where it is safe.

mod aside;
pub mod victim;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use aside::{Aside, aside_of};
use victim::Victim;

use crate::sys::mount as mounts;

/// How long the kernel may take to kill the victim. It drops the cgroup's page cache
/// first, and may have to write it back. The agent waits 10 s for all of it.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// Memory that is left when the limit is lowered.
const ROOM: u64 = 8 << 20;
/// Beyond what the limit leaves, in case that others free some meanwhile.
const MARGIN: u64 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("its memory is not controlled on the host")]
    NoController,
    #[error("{step}: {source}")]
    Io {
        step: &'static str,
        source: io::Error,
    },
    #[error("the kernel has killed no process")]
    NotKilled,
}

fn step(step: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { step, source }
}

/// The files of a memory cgroup.
struct Files {
    usage: &'static str,
    limit: &'static str,
    kills: &'static str,
    /// Others that are to have these values meanwhile, where they exist: nothing is
    /// swapped out, and one process is killed, not all of them.
    meanwhile: &'static [(&'static str, &'static str)],
}

const V1: Files = Files {
    usage: "memory.usage_in_bytes",
    limit: "memory.limit_in_bytes",
    kills: "memory.oom_control",
    meanwhile: &[("memory.swappiness", "0")],
};

const V2: Files = Files {
    usage: "memory.current",
    limit: "memory.max",
    kills: "memory.events",
    meanwhile: &[("memory.swap.max", "0"), ("memory.oom.group", "0")],
};

/// A directory in a mount of its own, because all others that the sandboxer sees are
/// read-only. The mount is gone with the value.
struct Writable(OwnedFd);

impl Writable {
    fn new(dir: &Path) -> io::Result<Writable> {
        let mount = mounts::clone_path(dir, false)?;
        mounts::set_writable(mount.as_fd())?;
        Ok(Writable(mount))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

/// The cgroup of a container that has its memory.
struct MemoryCgroup {
    dir: PathBuf,
    files: &'static Files,
}

impl MemoryCgroup {
    fn find(directories: &[PathBuf]) -> Option<MemoryCgroup> {
        directories.iter().find_map(|dir| {
            let has = |files: &&Files| {
                [files.usage, files.limit, files.kills]
                    .iter()
                    .all(|file| dir.join(file).exists())
            };
            let files = [&V1, &V2].into_iter().find(has)?;
            Some(MemoryCgroup {
                dir: dir.clone(),
                files,
            })
        })
    }

    /// The same where it can be written to.
    fn writable(&self) -> io::Result<(MemoryCgroup, Writable)> {
        // The directory above, because the machine goes beside.
        let (Some(above), Some(name)) = (self.dir.parent(), self.dir.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let above = Writable::new(above)?;
        let cgroup = MemoryCgroup {
            dir: above.path().join(name),
            files: self.files,
        };
        Ok((cgroup, above))
    }

    fn read(&self, file: &str) -> io::Result<String> {
        Ok(fs::read_to_string(self.dir.join(file))?.trim().to_owned())
    }

    fn usage(&self) -> io::Result<u64> {
        let text = self.read(self.files.usage)?;
        text.parse().map_err(io::Error::other)
    }

    fn kills(&self) -> io::Result<u64> {
        Ok(kills(&self.read(self.files.kills)?))
    }
}

/// `oom_kill` of a flat keyed file; kernels before 4.13 do not count.
fn kills(text: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == "oom_kill")
        .and_then(|(_, count)| count.parse().ok())
        .unwrap_or(0)
}

/// A value of a cgroup's file for the moment.
struct Setting {
    path: PathBuf,
    before: String,
    meanwhile: String,
}

impl Setting {
    fn set(dir: &Path, file: &str, value: &str) -> io::Result<Setting> {
        let path = dir.join(file);
        let before = fs::read_to_string(&path)?.trim().to_owned();
        fs::write(&path, value)?;
        let meanwhile = fs::read_to_string(&path)?.trim().to_owned();
        Ok(Setting {
            path,
            before,
            meanwhile,
        })
    }

    /// Puts the value back, unless somebody else has set another (`update`).
    fn undo(&self) -> io::Result<()> {
        match fs::read_to_string(&self.path)?.trim() == self.meanwhile {
            true => fs::write(&self.path, &self.before),
            false => Ok(()),
        }
    }
}

/// Has the kernel kill a process for lack of memory in the container's cgroup, one of
/// `directories`, whose notifications have been sent when this returns. `machine` are
/// the processes of the VM, wherever they are.
///
/// # Errors
/// When it is not to be, see [`Error`]; the cgroup is as it was, or the VM is aside.
pub fn report(directories: &[PathBuf], machine: &[i32]) -> Result<(), Error> {
    let cgroup = MemoryCgroup::find(directories).ok_or(Error::NoController)?;
    let (cgroup, _mount) = cgroup.writable().map_err(step("opening the cgroup"))?;
    let kills = cgroup.kills().map_err(step("counting kills"))?;
    let aside = Aside::step(&cgroup.dir, machine).map_err(step("moving the machine aside"))?;
    let outcome = squeeze(&cgroup);
    match outcome {
        Ok(Squeezed::Undone) => aside.back().map_err(step("moving the machine back"))?,
        // The machine must not come back to a limit that is as low as that.
        Ok(Squeezed::Stuck(source)) => {
            return Err(Error::Io {
                step: "raising the limit again",
                source,
            });
        }
        Err(e) => {
            aside.back().map_err(step("moving the machine back"))?;
            return Err(e);
        }
    }
    match cgroup.kills() {
        Ok(now) if now > kills => Ok(()),
        // It may be deleted already.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(_) => Err(Error::NotKilled),
        Err(e) => Err(step("counting kills")(e)),
    }
}

/// Whether everything was put back.
enum Squeezed {
    Undone,
    Stuck(io::Error),
}

fn squeeze(cgroup: &MemoryCgroup) -> Result<Squeezed, Error> {
    let mut victim = Victim::spawn().map_err(step("starting a process"))?;
    victim
        .enter(&cgroup.dir)
        .map_err(step("putting a process into the cgroup"))?;
    // Without these it works as well, or the kernel has no such thing.
    let others: Vec<Setting> = cgroup
        .files
        .meanwhile
        .iter()
        .filter_map(|(file, value)| Setting::set(&cgroup.dir, file, value).ok())
        .collect();
    let usage = cgroup.usage().map_err(step("reading what is used"))?;
    let limit = Setting::set(&cgroup.dir, cgroup.files.limit, &(usage + ROOM).to_string());
    let killed = match &limit {
        Ok(_) => victim.take(usage + ROOM + MARGIN, KILL_DEADLINE),
        Err(_) => Ok(()),
    };
    // It is gone before anything else happens.
    victim.end();
    let undone = limit.as_ref().map_or(Ok(()), Setting::undo);
    for other in &others {
        if let Err(e) = other.undo() {
            log::warn!("{}: {e}", other.path.display());
        }
    }
    match (limit, undone, killed) {
        (_, Err(e), _) if e.kind() != io::ErrorKind::NotFound => Ok(Squeezed::Stuck(e)),
        (Err(e), ..) => Err(step("lowering the limit")(e)),
        (_, _, Err(e)) => Err(step("using memory")(e)),
        _ => Ok(Squeezed::Undone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_counted_in_both_versions() {
        let v1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        let v2 = "low 0\nhigh 0\nmax 7\noom 4\noom_kill 2\noom_group_kill 0\n";
        assert_eq!(kills(v1), 3);
        assert_eq!(kills(v2), 2);
        assert_eq!(kills("oom_kill_disable 0\nunder_oom 0\n"), 0);
    }

    #[test]
    fn a_cgroup_with_memory_is_told_by_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let (cpu, memory) = (dir.path().join("cpu"), dir.path().join("memory"));
        let both = [cpu.clone(), memory.clone()];
        fs::create_dir(&cpu).unwrap();
        fs::create_dir(&memory).unwrap();
        assert!(MemoryCgroup::find(&both).is_none());
        assert!(matches!(report(&both, &[]), Err(Error::NoController)));
        for file in [V2.usage, V2.limit, V2.kills] {
            fs::write(memory.join(file), "oom_kill 1\n").unwrap();
        }
        let found = MemoryCgroup::find(&both).unwrap();
        assert_eq!(found.dir, memory);
        assert_eq!(found.kills().unwrap(), 1);
    }

    #[test]
    fn what_somebody_else_has_set_meanwhile_stays() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.max");
        fs::write(&file, "max\n").unwrap();
        let setting = Setting::set(dir.path(), "memory.max", "1000").unwrap();
        setting.undo().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "max");
        let setting = Setting::set(dir.path(), "memory.max", "1000").unwrap();
        fs::write(&file, "5000\n").unwrap();
        setting.undo().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "5000\n");
    }
}
