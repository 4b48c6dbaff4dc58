//! What programs of the host serve over vhost-user. They may be gone at any time: a
//! request that one of them has had ends never then, so whoever waits for such a
//! request does so on a thread of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kuasar_runv_protocol::storage;
use kuasar_runv_protocol::words::words;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::uevents::appears;
use super::{Error, Result, make_place};
use crate::{hotplug, mmio};

/// The file system of a virtio-fs device.
pub const VIRTIO_FS: &str = "virtiofs";

/// How long such a program may take; longer than what is waited for meanwhile.
pub const ANSWERED: Duration = Duration::from_secs(20);

/// A device that is being made use of. Given up, its driver lets go of it like any other
/// when the host takes it away; a place that was kept for good would be lost for the pod.
pub struct Claim {
    place: String,
    is_given_up: bool,
}

impl Claim {
    pub fn new(place: &str) -> Claim {
        hotplug::keep(place);
        Claim {
            place: place.to_owned(),
            is_given_up: true,
        }
    }

    pub fn place(&self) -> &str {
        &self.place
    }

    /// It is in use, or does not answer: only [`hotplug::remove_at`] has it let go.
    pub fn hold(mut self) -> String {
        self.is_given_up = false;
        std::mem::take(&mut self.place)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.is_given_up {
            hotplug::release(&self.place);
        }
    }
}

/// Does something with the device in a place; `None` if that does not end in time,
/// or the device says that it is no use to try.
pub fn within<T: Send + 'static>(
    deadline: Duration,
    place: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    if has_failed(place) {
        return None;
    }
    let (sender, done) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("served".to_owned())
        .spawn(move || drop(sender.send(work())))
        .ok()?;
    done.recv_timeout(deadline).ok()
}

fn has_failed(place: &str) -> bool {
    let device = hotplug::device_at(place).ok().flatten();
    // Its place is what is above the virtio device.
    let of_place = device.as_deref().and_then(Path::parent);
    of_place.is_some_and(|place| mmio::is_gone(place).unwrap_or(false))
}

/// Files that a program of the host serves.
pub struct ServedFiles {
    place: String,
    mounted: PathBuf,
    is_stuck: bool,
}

impl ServedFiles {
    /// Waits for the device and mounts it. `tag` is that of the device.
    ///
    /// # Errors
    /// It does not appear, or cannot be mounted; it is not mounted then.
    pub fn mount(tag: &str, wanted: &storage::Disk) -> Result<ServedFiles> {
        let claim = Claim::new(&wanted.place);
        let bound = || Ok(hotplug::device_at(claim.place())?.filter(|d| d.join("driver").exists()));
        let _device = appears(tag, bound)?;
        let mounted = make_place(tag)?;
        let (source, target) = (tag.to_owned(), mounted.clone());
        let (options, read_only) = (wanted.options.clone(), wanted.read_only);
        let result = within(ANSWERED, claim.place(), move || {
            let flags = match read_only {
                true => MsFlags::MS_RDONLY,
                false => MsFlags::empty(),
            };
            let data = Some(options.as_str()).filter(|data| !data.is_empty());
            mount(Some(source.as_str()), &target, Some(VIRTIO_FS), flags, data)
        });
        match result {
            Some(Ok(())) => Ok(ServedFiles {
                place: claim.hold(),
                mounted,
                is_stuck: false,
            }),
            Some(Err(e)) => {
                // Still empty.
                drop(fs::remove_dir(&mounted));
                let why = words(&e.into());
                Err(Error::Invalid(format!("mounting {VIRTIO_FS}: {why}")))
            }
            None => {
                claim.hold();
                Err(stuck())
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.mounted
    }

    /// Writes everything back and lets go of the device.
    ///
    /// # Errors
    /// The program does not answer.
    pub fn remove(&mut self) -> Result<()> {
        if self.is_stuck {
            return Err(stuck());
        }
        let (mounted, place) = (self.mounted.clone(), self.place.clone());
        let removed = within(ANSWERED, &self.place, move || {
            umount2(&mounted, MntFlags::MNT_DETACH)
                .map_err(Error::io(format!("unmounting {}", mounted.display())))?;
            // Empty, and nobody else's.
            drop(fs::remove_dir(&mounted));
            hotplug::remove_at(&place).map_err(Error::io("letting go of a virtio-fs device"))
        });
        match removed {
            Some(done) => done,
            None => {
                self.is_stuck = true;
                Err(stuck())
            }
        }
    }
}

fn stuck() -> Error {
    Error::Deadline(
        "the program that serves the files does not answer: they stay until the machine ends"
            .to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_kept_as_long_as_somebody_uses_it() {
        let device = |place: &str| PathBuf::from(format!("/sys/devices/platform/{place}"));
        let given_up = Claim::new("LNRO0005:70");
        assert!(hotplug::is_kept(&device("LNRO0005:70")));
        drop(given_up);
        assert!(!hotplug::is_kept(&device("LNRO0005:70")));
        let used = Claim::new("LNRO0005:71").hold();
        assert!(hotplug::is_kept(&device(&used)));
        hotplug::remove_at(&used).unwrap();
        assert!(!hotplug::is_kept(&device(&used)));
    }
}
