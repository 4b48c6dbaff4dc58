//! A disk of the host: a virtio-blk device, found by its serial number, or by the place
//! it is plugged in when another program of the host serves it.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use kuasar_runv_protocol::storage;
use kuasar_runv_protocol::words::words;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::served::{ANSWERED, Claim, within};
use super::uevents::appears;
use super::{Error, Result, make_place};
use crate::hotplug;

const BLOCK_DEVICES: &str = "/sys/block";
/// How long a file system may stay in use after its last container is gone: the
/// kernel takes mount namespaces apart in the background.
const FREED: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);

/// A disk, and where its file system is mounted if it has one.
#[derive(Clone)]
pub struct Disk {
    node: PathBuf,
    number: (u32, u32),
    mounted: Option<PathBuf>,
    /// Where it is plugged in, if a program serves it that may be gone.
    place: Option<String>,
    /// It could not be removed in time, and nobody waits for it again.
    is_stuck: bool,
}

impl Disk {
    /// Waits for the disk and mounts it where that is wanted.
    ///
    /// # Errors
    /// It does not appear, or cannot be mounted; it is not mounted then.
    pub fn find(serial: &str, wanted: &storage::Disk) -> Result<Disk> {
        let claim = (!wanted.place.is_empty()).then(|| Claim::new(&wanted.place));
        let name = match &claim {
            Some(claim) => wait_at(claim.place())?,
            None => wait_for(serial)?,
        };
        let node = Path::new("/dev").join(name);
        let failed = || Error::io::<io::Error>(format!("the device {}", node.display()));
        let rdev = fs::metadata(&node).map_err(failed())?.rdev();
        if wanted.fs_type.is_empty() {
            chown(&node, Some(wanted.uid), Some(wanted.gid)).map_err(failed())?;
            fs::set_permissions(&node, Permissions::from_mode(wanted.mode)).map_err(failed())?;
        }
        let mut disk = Disk {
            node,
            number: (libc::major(rdev), libc::minor(rdev)),
            mounted: None,
            place: None,
            is_stuck: false,
        };
        if !wanted.fs_type.is_empty() {
            let mounted = match &claim {
                Some(claim) => {
                    let (copy, serial, wanted) = (disk.clone(), serial.to_owned(), wanted.clone());
                    within(ANSWERED, claim.place(), move || {
                        copy.mount(&serial, &wanted)
                    })
                }
                None => Some(disk.mount(serial, wanted)),
            };
            let Some(mounted) = mounted else {
                claim.map(Claim::hold);
                return Err(stuck(&disk.node));
            };
            disk.mounted = Some(mounted?);
        }
        disk.place = claim.map(Claim::hold);
        Ok(disk)
    }

    fn mount(&self, serial: &str, wanted: &storage::Disk) -> Result<PathBuf> {
        let place = make_place(serial)?;
        let flags = match wanted.read_only {
            true => MsFlags::MS_RDONLY,
            false => MsFlags::empty(),
        };
        let data = Some(wanted.options.as_str()).filter(|data| !data.is_empty());
        let kind = wanted.fs_type.as_str();
        mount(Some(&self.node), &place, Some(kind), flags, data).map_err(|e| {
            // Still empty.
            drop(fs::remove_dir(&place));
            match e {
                nix::Error::ENODEV => Error::Invalid(format!(
                    "the guest's kernel does not know the file system {kind:?}"
                )),
                e => Error::Invalid(format!("mounting {kind}: {}", words(&e.into()))),
            }
        })?;
        Ok(place)
    }

    /// The device, or where it is mounted.
    pub fn path(&self) -> &Path {
        self.mounted.as_ref().unwrap_or(&self.node)
    }

    pub fn number(&self) -> (u32, u32) {
        self.number
    }

    /// Writes everything to the disk and lets go of it. Goes on where it failed.
    ///
    /// # Errors
    /// It is still in use at the deadline; it has failed.
    pub fn remove(&mut self) -> Result<()> {
        let Some(place) = self.place.clone() else {
            return self.remove_now();
        };
        if self.is_stuck {
            return Err(stuck(&self.node));
        }
        let mut copy = self.clone();
        match within(ANSWERED, &place, move || copy.remove_now()) {
            Some(done) => done,
            None => {
                self.is_stuck = true;
                Err(stuck(&self.node))
            }
        }
    }

    fn remove_now(&mut self) -> Result<()> {
        if let Some(place) = &self.mounted {
            sync_file_system(place)
                .map_err(Error::io(format!("writing {} back", place.display())))?;
            umount2(place, MntFlags::MNT_DETACH)
                .map_err(Error::io(format!("unmounting {}", place.display())))?;
            // Empty, and nobody else's.
            drop(fs::remove_dir(place));
            self.mounted = None;
        }
        let deadline = Instant::now() + FREED;
        loop {
            match self.sync_when_free() {
                Ok(()) => return self.let_go(),
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                // The host has taken it away already.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENXIO)) => {
                    return Ok(());
                }
                Err(e) => {
                    return Err(Error::io(format!("writing {} back", self.node.display()))(
                        e,
                    ));
                }
            }
            if Instant::now() >= deadline {
                return Err(Error::Deadline(format!(
                    "the disk {} is still in use",
                    self.node.display()
                )));
            }
            sleep(POLL);
        }
    }

    /// The host takes the device away without asking.
    fn let_go(&self) -> Result<()> {
        if let Some(place) = &self.place {
            return hotplug::remove_at(place)
                .map_err(Error::io(format!("letting go of {}", self.node.display())));
        }
        let name = self.node.file_name().unwrap_or_default();
        hotplug::remove(&Path::new(BLOCK_DEVICES).join(name))
            .map_err(Error::io(format!("letting go of {}", self.node.display())))
    }

    /// `EBUSY` while a file system has the device.
    fn sync_when_free(&self) -> io::Result<()> {
        let device = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(&self.node)?;
        device.sync_all()
    }
}

fn stuck(node: &Path) -> Error {
    Error::Deadline(format!(
        "the program that serves {} does not answer: it stays until the machine ends",
        node.display()
    ))
}

fn sync_file_system(place: &Path) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let dir = File::open(place)?;
    // SAFETY: takes a descriptor.
    crate::sys::check(unsafe { libc::syncfs(dir.as_raw_fd()) }.into()).map(drop)
}

/// The name of the disk with this serial number, when it is there.
fn wait_for(serial: &str) -> Result<String> {
    appears(serial, || find_in(Path::new(BLOCK_DEVICES), serial))
}

/// The name of the disk in this place, when it is there.
fn wait_at(place: &str) -> Result<String> {
    appears(place, || {
        let Some(device) = hotplug::device_at(place)? else {
            return Ok(None);
        };
        let disks = match fs::read_dir(device.join("block")) {
            // The driver has not come as far.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let name = |disk: io::Result<fs::DirEntry>| disk.ok()?.file_name().into_string().ok();
        Ok(disks.filter_map(name).next())
    })
}

fn find_in(sysfs: &Path, serial: &str) -> io::Result<Option<String>> {
    let entries = match fs::read_dir(sysfs) {
        Ok(entries) => entries,
        // Without a block device the directory may be missing.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        // Other devices have none.
        let found = fs::read_to_string(entry.path().join("serial"));
        if found.is_ok_and(|found| found.trim_end() == serial) {
            return Ok(entry.file_name().into_string().ok());
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_found_by_their_serial_number() {
        let dir = std::env::temp_dir().join(format!("kuasar-disks-{}", std::process::id()));
        for (name, serial) in [("vda", "one"), ("vdb", "two\n"), ("loop0", "")] {
            fs::create_dir_all(dir.join(name)).unwrap();
            if !serial.is_empty() {
                fs::write(dir.join(name).join("serial"), serial).unwrap();
            }
        }
        let found = |serial| find_in(&dir, serial).unwrap();
        assert_eq!(found("one").as_deref(), Some("vda"));
        assert_eq!(found("two").as_deref(), Some("vdb"));
        assert_eq!(found("tw"), None);
        assert_eq!(find_in(&dir.join("none"), "one").unwrap(), None);
        fs::remove_dir_all(&dir).unwrap();
    }
}
