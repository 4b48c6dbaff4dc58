//! Disks: block devices of the host, and files that are images of one.
//!
//! | in config.json | in the container |
//! |---|---|
//! | a bind mount of a block device | the device |
//! | a block device in `linux.devices` | the device |
//! | a mount with the type of a disk's file system, whose source is a block device, a regular file or the socket of a program that speaks vhost-user | the file system, mounted in the guest |
//! | a mount of type `vhost-user-blk` with such a socket | the device |
//! | a mount of type `virtiofs` with such a socket | the file system that the program serves |

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use kuasar_runv_protocol::storage;
use oci_spec::runtime::Mount;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::super::guest_spec::Error;
use super::super::mount_options;
use super::vhost_user::Wanted;
use super::{at, vhost_user};
use crate::sandbox::control::{DiskSource, VIRTIO_FS};

/// Type of a mount that is a program's disk itself.
const RAW: &str = "vhost-user-blk";

/// A machine that another command has just ended, or taken the disk away from, closes
/// it a moment later.
const LET_GO: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(10);

/// What is to be mounted from a disk.
#[derive(Debug, PartialEq, Eq)]
pub struct FileSystem {
    pub kind: String,
    /// Comma-separated; those that only it knows.
    pub options: String,
}

/// A disk that a container uses.
#[derive(Debug, PartialEq, Eq)]
pub struct Disk {
    pub source: PathBuf,
    pub read_only: bool,
    pub file_system: Option<FileSystem>,
    /// Of a block device on the host.
    pub number: Option<(u32, u32)>,
    pub kind: DiskSource,
    /// Of a file or socket: device and inode.
    file: (u64, u64),
    /// Permissions and owner of the node.
    mode: u32,
    owner: (u32, u32),
}

impl Disk {
    /// A block device, an image, or what a program serves.
    #[must_use]
    pub fn device(source: PathBuf, metadata: &Metadata, read_only: bool) -> Disk {
        let kind = match metadata.file_type() {
            kind if kind.is_block_device() => DiskSource::Device,
            kind if kind.is_socket() => DiskSource::Program,
            _ => DiskSource::Image,
        };
        let is_device = kind == DiskSource::Device;
        let rdev = metadata.rdev();
        Disk {
            source,
            read_only,
            file_system: None,
            number: is_device.then(|| (libc::major(rdev), libc::minor(rdev))),
            kind,
            file: (metadata.dev(), metadata.ino()),
            mode: metadata.mode() & 0o7777,
            owner: (metadata.uid(), metadata.gid()),
        }
    }

    /// Names the disk among all of the host.
    #[must_use]
    pub fn key(&self) -> String {
        match (self.number, self.file) {
            (Some((major, minor)), _) => format!("device {major}:{minor}"),
            (None, (device, inode)) => format!("file {device:x}:{inode:x}"),
        }
    }

    /// A device that has no number on the host.
    #[must_use]
    pub fn is_unnumbered(&self) -> bool {
        self.kind == DiskSource::Program && self.file_system.is_none()
    }

    /// What the guest is told of the disk that is plugged in at `place`.
    #[must_use]
    pub fn request(&self, place: &str) -> storage::Disk {
        // A program's disk has no serial number of ours.
        let place = match self.kind {
            DiskSource::Program => place,
            DiskSource::Image | DiskSource::Device => "",
        };
        let (fs_type, options) = match &self.file_system {
            Some(fs) => (fs.kind.clone(), fs.options.clone()),
            None => Default::default(),
        };
        storage::Disk {
            fs_type,
            options,
            read_only: self.read_only,
            mode: self.mode,
            uid: self.owner.0,
            gid: self.owner.1,
            place: place.to_owned(),
            ..storage::Disk::new()
        }
    }

    /// Opens it for the hypervisor. As long as it is open, nobody else opens it so
    /// who could change it under the guest: other virtual machines are kept out by
    /// flock(2), and from writing to a device the host itself by `O_EXCL`. A program
    /// decides for itself whom it serves.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::Volume`].
    pub fn open(&self) -> Result<OwnedFd, Error> {
        if self.kind == DiskSource::Program {
            let mounted = self.file_system.as_ref();
            let files = mounted.is_some_and(|mounted| mounted.kind == VIRTIO_FS);
            let wanted = if files { Wanted::Files } else { Wanted::Disk };
            return vhost_user::connect(&self.source, wanted);
        }
        let mut options = OpenOptions::new();
        options.read(true).write(!self.read_only);
        if self.number.is_some() && !self.read_only {
            options.custom_flags(libc::O_EXCL);
        }
        let deadline = Instant::now() + LET_GO;
        loop {
            match self.try_open(&options) {
                Err(Error::InUse(_)) if Instant::now() < deadline => sleep(POLL),
                other => return other,
            }
        }
    }

    fn try_open(&self, options: &OpenOptions) -> Result<OwnedFd, Error> {
        let in_use = || Error::InUse(self.source.clone());
        let file: File = options
            .open(&self.source)
            .map_err(|e| match e.raw_os_error() {
                Some(libc::EBUSY) => in_use(),
                _ => at(&self.source)(e),
            })?;
        let lock = match self.read_only {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        match flock(&file, lock) {
            Ok(()) => Ok(file.into()),
            Err(Errno::WOULDBLOCK) => Err(in_use()),
            Err(e) => Err(at(&self.source)(e.into())),
        }
    }
}

/// What a mount of config.json with a type of its own is in the guest.
#[derive(Debug)]
pub struct DiskMount {
    pub disk: Disk,
    /// Options of the bind mount that the container makes of it.
    pub options: Vec<String>,
}

/// The disk a mount is of; `None` when its source is none.
///
/// # Errors
/// [`Error::Volume`] when the source cannot be looked at.
pub fn of_mount(mount: &Mount, kind: &str) -> Result<Option<DiskMount>, Error> {
    let Some(source) = mount.source().as_ref().filter(|path| path.is_absolute()) else {
        return Ok(None);
    };
    let metadata = source.metadata().map_err(at(source))?;
    let is_socket = metadata.file_type().is_socket();
    let is_disk = metadata.file_type().is_block_device() || metadata.is_file() || is_socket;
    if !is_disk || kind.is_empty() {
        return Ok(None);
    }
    if !is_socket && [VIRTIO_FS, RAW].contains(&kind) {
        return Err(Error::Unsupported(format!(
            "a mount of type {kind:?} needs the socket of a program that speaks vhost-user, which {} is not",
            source.display()
        )));
    }
    let given = mount.options().iter().flatten();
    let (mut options, data): (Vec<String>, Vec<String>) = given
        .cloned()
        .partition(|option| mount_options::KNOWN.binary_search(&option.as_str()).is_ok());
    // The last of both counts.
    let read_only = options.iter().rev().find(|o| *o == "ro" || *o == "rw");
    let read_only = read_only.is_some_and(|option| option == "ro");
    options.push("bind".into());
    let mut disk = Disk::device(source.clone(), &metadata, read_only || kind == "erofs");
    disk.file_system = (kind != RAW).then(|| FileSystem {
        kind: kind.to_owned(),
        options: data.join(","),
    });
    if kind == RAW && !data.is_empty() {
        return Err(Error::Unsupported(format!(
            "a mount of type {RAW:?} has no options of a file system: {}",
            data.join(",")
        )));
    }
    Ok(Some(DiskMount { disk, options }))
}

/// Opens nothing: whether a block device has no medium, as a loop device without a
/// file.
///
/// # Errors
/// The device does not exist.
pub fn is_empty(sysfs: &Path) -> io::Result<bool> {
    Ok(std::fs::read_to_string(sysfs.join("size"))?.trim() == "0")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mount(source: &Path, options: &[&str]) -> Mount {
        serde_json::from_value(json!({
            "destination": "/x", "type": "ext4", "source": source, "options": options,
        }))
        .unwrap()
    }

    #[test]
    fn a_file_is_a_disk_that_one_machine_may_write_to() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, "").unwrap();
        let options = ["noatime", "ro", "discard", "nosuid", "rw", "data=ordered"];
        let found = of_mount(&mount(&image, &options), "ext4").unwrap().unwrap();
        assert_eq!(found.options, ["noatime", "ro", "nosuid", "rw", "bind"]);
        let fs = found.disk.file_system.as_ref().unwrap();
        assert_eq!(fs.options, "discard,data=ordered");
        assert!(!found.disk.read_only && found.disk.number.is_none());

        let held = found.disk.open().unwrap();
        for options in [&[][..], &["ro"]] {
            let other = of_mount(&mount(&image, options), "ext4").unwrap().unwrap();
            assert!(
                matches!(other.disk.open(), Err(Error::InUse(_))),
                "{options:?}"
            );
        }
        drop(held);
        let reader = || of_mount(&mount(&image, &["ro"]), "ext4").unwrap().unwrap();
        let _first = reader().disk.open().unwrap();
        let _second = reader().disk.open().unwrap();
    }

    #[test]
    fn a_socket_is_a_program_that_serves_a_disk_or_files() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, image) = (dir.path().join("socket"), dir.path().join("image"));
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        std::fs::write(&image, "").unwrap();
        for (kind, file_system) in [
            ("ext4", Some("ext4")),
            ("virtiofs", Some("virtiofs")),
            ("vhost-user-blk", None),
        ] {
            let found = of_mount(&mount(&socket, &["nosuid"]), kind)
                .unwrap()
                .unwrap();
            assert_eq!(found.disk.kind, DiskSource::Program);
            assert_eq!(found.disk.request("pci:03").place, "pci:03");
            let found = found.disk.file_system.map(|fs| fs.kind);
            assert_eq!(found.as_deref(), file_system);
        }
        let data = of_mount(&mount(&socket, &["discard"]), "vhost-user-blk");
        assert!(data.is_err_and(|e| e.to_string().contains("discard")));
        for kind in ["virtiofs", "vhost-user-blk"] {
            let error = of_mount(&mount(&image, &[]), kind).unwrap_err().to_string();
            assert!(error.contains("speaks vhost-user"), "{error}");
        }
        let disk = of_mount(&mount(&image, &[]), "ext4").unwrap().unwrap().disk;
        assert_eq!(disk.request("pci:03").place, "");
    }

    #[test]
    fn what_is_no_disk_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert!(of_mount(&mount(dir.path(), &[]), "ext4").unwrap().is_none());
        assert!(
            of_mount(&mount(Path::new("none"), &[]), "x")
                .unwrap()
                .is_none()
        );
        let missing = of_mount(&mount(&dir.path().join("missing"), &[]), "ext4");
        assert!(missing.is_err());
    }
}
