//! The volumes in the pod's shared directory: what is attached once for all the
//! containers that use it.
//!
//! Two mounts of the host are two file systems for the guest, with an inode, a page
//! cache and locks of their own for the same file. So what several containers (or
//! one in several places) bind from the same source is attached once, and each
//! container binds it in the guest. It is writable while somebody may write to it;
//! who may not is held by the guest's kernel then, and by the host's otherwise.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, statat};

use crate::sys::mount as mounts;

/// A volume and who uses it.
#[derive(Debug)]
struct Volume {
    mount: OwnedFd,
    uses: Vec<Use>,
}

#[derive(Debug, PartialEq, Eq)]
struct Use {
    container: String,
    writes: bool,
}

/// The volumes by the names they have in the shared directory.
#[derive(Debug, Default)]
pub struct Volumes(HashMap<String, Volume>);

impl Volumes {
    /// Adds a use of a volume that is there; `false` if it is not. `tree` is another
    /// clone of the same source.
    ///
    /// # Errors
    /// `InvalidInput` when it is a clone of something else; as mount_setattr(2).
    pub fn share(
        &mut self,
        name: &str,
        container: &str,
        writes: bool,
        tree: BorrowedFd<'_>,
    ) -> io::Result<bool> {
        let Some(volume) = self.0.get_mut(name) else {
            return Ok(false);
        };
        if identity(tree)? != identity(volume.mount.as_fd())? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the source of a volume was replaced while it was shared",
            ));
        }
        // What is read-only on the host stays so.
        let mount = volume.mount.as_fd();
        if writes && mounts::is_read_only(mount)? && !mounts::is_read_only(tree)? {
            mounts::set_writable(mount)?;
        }
        volume.uses.push(Use {
            container: container.to_owned(),
            writes,
        });
        Ok(true)
    }

    /// Notes a volume that has just been attached.
    pub fn insert(&mut self, name: &str, container: &str, writes: bool, mount: OwnedFd) {
        let uses = vec![Use {
            container: container.to_owned(),
            writes,
        }];
        self.0.insert(name.to_owned(), Volume { mount, uses });
    }

    /// Ends the uses of a container; returns the volumes that nobody uses any more.
    pub fn release(&mut self, container: &str) -> Vec<(String, OwnedFd)> {
        for (name, volume) in &mut self.0 {
            let before = volume.uses.len();
            volume.uses.retain(|u| u.container != container);
            let readers_left = !volume.uses.is_empty() && !volume.uses.iter().any(|u| u.writes);
            // Busy when the guest has not closed what was written; the next time, then.
            if before != volume.uses.len()
                && readers_left
                && let Err(e) = mounts::set_read_only(volume.mount.as_fd(), false)
            {
                log::info!("volume {name} stays writable: {e}");
            }
        }
        let unused = self.0.extract_if(|_, volume| volume.uses.is_empty());
        unused.map(|(name, volume)| (name, volume.mount)).collect()
    }
}

fn identity(tree: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let stat = statat(tree, "", AtFlags::EMPTY_PATH)?;
    Ok((stat.st_dev, stat.st_ino))
}
