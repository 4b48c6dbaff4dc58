//! Memory that containers share: a tmpfs outside of any container, which they bind.
//!
//! Through virtio-fs each container's mount would be a file system of its own, and
//! what two of them map would not be the same memory.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kuasar_runv_protocol::agent::SharedMemory as Wanted;
use kuasar_runv_protocol::stream::MAX_ID_LEN;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{ContainerError, Result};

/// A mounted tmpfs; unmounted when dropped. Containers that still have it mounted
/// keep what is in it.
pub struct SharedMemory {
    path: PathBuf,
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        let gone = umount2(&self.path, MntFlags::MNT_DETACH)
            .map_err(io::Error::from)
            .and_then(|()| fs::remove_dir(&self.path));
        if let Err(e) = gone {
            log::error!("unmounting {}: {e}", self.path.display());
        }
    }
}

/// All there are, by name. Each lives as long as a container has it.
pub struct Pool {
    dir: PathBuf,
    mounted: Mutex<HashMap<String, Weak<SharedMemory>>>,
}

impl Pool {
    /// Mounts are made below `dir`.
    pub fn new(dir: &Path) -> Pool {
        Pool {
            dir: dir.to_owned(),
            mounted: Mutex::default(),
        }
    }

    /// What a container is to have, mounted now or before.
    ///
    /// # Errors
    /// `Invalid` for a bad name or mode; of mount(2).
    pub fn take_all(&self, wanted: &[Wanted]) -> Result<Vec<Arc<SharedMemory>>> {
        wanted.iter().map(|wanted| self.take(wanted)).collect()
    }

    fn take(&self, wanted: &Wanted) -> Result<Arc<SharedMemory>> {
        let name = &wanted.name;
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if name.is_empty() || name.len() > MAX_ID_LEN || !name.chars().all(allowed) {
            return Err(ContainerError::Invalid(format!(
                "{name:?} is no name of shared memory"
            )));
        }
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        mounted.retain(|_, memory| memory.strong_count() > 0);
        if let Some(memory) = mounted.get(name).and_then(Weak::upgrade) {
            return Ok(memory);
        }
        let path = self.dir.join(name);
        let memory = mount_tmpfs(&path, wanted)
            .map(Arc::new)
            .map_err(ContainerError::io(format!("mounting {}", path.display())))?;
        mounted.insert(name.clone(), Arc::downgrade(&memory));
        Ok(memory)
    }
}

fn mount_tmpfs(path: &Path, wanted: &Wanted) -> io::Result<SharedMemory> {
    let mut options = format!(
        "mode={:o},uid={},gid={}",
        wanted.mode & 0o7777,
        wanted.uid,
        wanted.gid
    );
    if wanted.size > 0 {
        options.push_str(&format!(",size={}", wanted.size));
    }
    fs::create_dir(path)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    match mount(
        Some("shm"),
        path,
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    ) {
        Ok(()) => Ok(SharedMemory {
            path: path.to_owned(),
        }),
        Err(e) => {
            // The error to report is that of the mount.
            drop(fs::remove_dir(path));
            Err(e.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leads_nowhere_else() {
        let dir = std::env::temp_dir();
        for name in ["", "..", "a/b", "a.b", &"x".repeat(MAX_ID_LEN + 1)] {
            let wanted = Wanted {
                name: name.to_owned(),
                ..Wanted::new()
            };
            let taken = Pool::new(&dir).take_all(&[wanted]);
            assert!(matches!(taken, Err(ContainerError::Invalid(_))), "{name:?}");
        }
    }
}
