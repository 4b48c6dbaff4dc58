//! physical: a network card that somebody has moved into the network namespace.
//!
//! Where the machine has an IOMMU, a PCI card is passed to the VM as it is: its
//! driver on the host gives it up for vfio-pci, and gets it back afterwards
//! (Documentation/driver-api/vfio.rst of the kernel). Any other card is tied to the
//! VM like the other kinds.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Connected, Endpoint};
use crate::sandbox::network::model::{self, Host};
use crate::sandbox::network::snapshot::Link;
use crate::sandbox::network::sysfs::Sysfs;

/// The kernel has no word for it.
pub const KIND: &str = "physical";
const VFIO_DRIVER: &str = "vfio-pci";
/// What the names of records of cards start with, before the address.
const RECORD: &str = "vfio-";
const DRIVERS: &str = "bus/pci/drivers";

pub struct Physical;

/// A card that is the VM's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// PCI address, "0000:3b:00.0".
    pub address: String,
    /// The host's driver that gave it up.
    driver: Option<String>,
}

impl Endpoint for Physical {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn connect(&self, host: &mut Host<'_>, link: &Link) -> io::Result<Connected> {
        if let Some(sysfs) = host.sysfs
            && let Some(address) = pci_address(sysfs, &link.name)?
            && has_iommu(sysfs, &address)?
        {
            return take(sysfs, &address, &host.sandbox_dir).map(Connected::Passed);
        }
        let model = host.model;
        model::tie(host, link, model).map(Connected::Tied)
    }
}

/// Address of the PCI card behind an interface; `None` for other buses.
fn pci_address(sysfs: &Sysfs, name: &str) -> io::Result<Option<String>> {
    let device = format!("class/net/{name}/device");
    let Some(subsystem) = sysfs.link(format!("{device}/subsystem"))? else {
        return Ok(None);
    };
    if subsystem.file_name().is_none_or(|bus| bus != "pci") {
        return Ok(None);
    }
    Ok(sysfs.link(device)?.as_deref().and_then(last))
}

fn has_iommu(sysfs: &Sysfs, address: &str) -> io::Result<bool> {
    let group = sysfs.link(format!("bus/pci/devices/{address}/iommu_group"))?;
    Ok(group.is_some())
}

/// Hands a card to vfio-pci.
fn take(sysfs: &Sysfs, address: &str, dir: &Path) -> io::Result<Passed> {
    let device = format!("bus/pci/devices/{address}");
    let driver = sysfs.link(format!("{device}/driver"))?;
    let passed = Passed {
        address: address.to_owned(),
        driver: driver
            .as_deref()
            .and_then(last)
            .filter(|d| d != VFIO_DRIVER),
    };
    if !sysfs.exists(format!("{DRIVERS}/{VFIO_DRIVER}")) {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "passing a network card to a virtual machine needs the driver vfio-pci: run modprobe vfio-pci",
        ));
    }
    passed.record(dir)?;
    bind(sysfs, &passed, VFIO_DRIVER).inspect_err(|_| {
        // The first error is the one to report.
        let _ = passed.give_back_by(sysfs, dir);
    })?;
    Ok(passed)
}

impl Passed {
    /// Returns the card to the driver it had.
    ///
    /// # Errors
    /// As write(2) to sysfs.
    pub fn give_back(&self, host: &Host<'_>) -> io::Result<()> {
        match host.sysfs {
            Some(sysfs) => self.give_back_by(sysfs, &host.sandbox_dir),
            None => Ok(()),
        }
    }

    fn give_back_by(&self, sysfs: &Sysfs, dir: &Path) -> io::Result<()> {
        if let Some(driver) = &self.driver {
            bind(sysfs, self, driver)?;
        }
        fs::remove_file(self.record_path(dir))
    }

    /// Notes in the sandbox's directory what is to be returned, should the sandboxer
    /// die.
    fn record(&self, dir: &Path) -> io::Result<()> {
        fs::write(
            self.record_path(dir),
            self.driver.as_deref().unwrap_or_default(),
        )
    }

    fn record_path(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{RECORD}{}", self.address))
    }
}

/// Returns the cards that a sandboxer that has died was given.
///
/// # Errors
/// As write(2) to sysfs.
pub fn give_all_back(sandbox_dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(sandbox_dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some(address) = name.to_str().and_then(|name| name.strip_prefix(RECORD)) else {
            continue;
        };
        let driver = fs::read_to_string(entry.path())?;
        let passed = Passed {
            address: address.to_owned(),
            driver: (!driver.is_empty()).then_some(driver),
        };
        passed.give_back_by(&Sysfs::at(Path::new("/sys"))?, sandbox_dir)?;
    }
    Ok(())
}

/// Gives a card to a driver, which takes it from the one it has.
fn bind(sysfs: &Sysfs, passed: &Passed, driver: &str) -> io::Result<()> {
    let address = &passed.address;
    let device = format!("bus/pci/devices/{address}");
    let bound = sysfs.link(format!("{device}/driver"))?;
    let bound = bound.as_deref().and_then(last);
    if bound.as_deref() == Some(driver) {
        return Ok(());
    }
    let to_override = if driver == VFIO_DRIVER { driver } else { "\n" };
    sysfs.write(format!("{device}/driver_override"), to_override)?;
    if let Some(bound) = bound {
        sysfs.write(format!("{DRIVERS}/{bound}/unbind"), address)?;
    }
    sysfs.write(format!("{DRIVERS}/{driver}/bind"), address)
}

/// The last component of a path, as text.
fn last(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const ADDRESS: &str = "0000:3b:00.0";

    /// A tree as sysfs has it for one card that the driver e1000 has.
    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("bus/pci/devices").join(ADDRESS);
        fs::create_dir_all(&device).unwrap();
        for driver in ["e1000", VFIO_DRIVER] {
            let driver = dir.path().join(DRIVERS).join(driver);
            fs::create_dir_all(&driver).unwrap();
            for file in ["bind", "unbind"] {
                fs::write(driver.join(file), "").unwrap();
            }
        }
        fs::write(device.join("driver_override"), "").unwrap();
        symlink("../../drivers/e1000", device.join("driver")).unwrap();
        symlink("../../../../bus/pci", device.join("subsystem")).unwrap();
        symlink("../../../kernel/iommu_groups/7", device.join("iommu_group")).unwrap();
        let net = dir.path().join("class/net/eth0");
        fs::create_dir_all(&net).unwrap();
        symlink(
            format!("../../../bus/pci/devices/{ADDRESS}"),
            net.join("device"),
        )
        .unwrap();
        dir
    }

    fn text(tree: &tempfile::TempDir, path: &str) -> String {
        fs::read_to_string(tree.path().join(path)).unwrap()
    }

    #[test]
    fn a_card_goes_to_vfio_and_comes_back() {
        let tree = tree();
        let sandbox = tempfile::tempdir().unwrap();
        let sysfs = Sysfs::at(tree.path()).unwrap();
        let address = pci_address(&sysfs, "eth0").unwrap().unwrap();
        assert_eq!(address, ADDRESS);
        assert!(has_iommu(&sysfs, &address).unwrap());
        let passed = take(&sysfs, &address, sandbox.path()).unwrap();
        assert_eq!(passed.driver.as_deref(), Some("e1000"));
        assert_eq!(text(&tree, "bus/pci/drivers/e1000/unbind"), ADDRESS);
        assert_eq!(text(&tree, "bus/pci/drivers/vfio-pci/bind"), ADDRESS);
        let overridden = format!("bus/pci/devices/{ADDRESS}/driver_override");
        assert_eq!(text(&tree, &overridden), VFIO_DRIVER);
        let record = sandbox.path().join(format!("vfio-{ADDRESS}"));
        assert_eq!(fs::read_to_string(&record).unwrap(), "e1000");

        // The kernel would have changed the link.
        let driver = tree
            .path()
            .join("bus/pci/devices")
            .join(ADDRESS)
            .join("driver");
        fs::remove_file(&driver).unwrap();
        symlink("../../drivers/vfio-pci", &driver).unwrap();
        passed.give_back_by(&sysfs, sandbox.path()).unwrap();
        assert_eq!(text(&tree, "bus/pci/drivers/vfio-pci/unbind"), ADDRESS);
        assert_eq!(text(&tree, "bus/pci/drivers/e1000/bind"), ADDRESS);
        assert!(!record.exists());
        give_all_back(sandbox.path()).unwrap();
    }

    #[test]
    fn without_the_driver_the_error_says_what_to_do() {
        let tree = tree();
        fs::remove_dir_all(tree.path().join(DRIVERS).join(VFIO_DRIVER)).unwrap();
        let sysfs = Sysfs::at(tree.path()).unwrap();
        let sandbox = tempfile::tempdir().unwrap();
        let error = take(&sysfs, ADDRESS, sandbox.path()).unwrap_err();
        assert!(error.to_string().contains("modprobe vfio-pci"), "{error}");
        assert_eq!(fs::read_dir(sandbox.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_no_pci_card_is_told_apart() {
        let tree = tree();
        let sysfs = Sysfs::at(tree.path()).unwrap();
        assert_eq!(pci_address(&sysfs, "eth1").unwrap(), None);
        let device = tree.path().join("bus/pci/devices").join(ADDRESS);
        fs::remove_file(device.join("subsystem")).unwrap();
        symlink("../../../../bus/virtio", device.join("subsystem")).unwrap();
        assert_eq!(pci_address(&sysfs, "eth0").unwrap(), None);
    }
}
