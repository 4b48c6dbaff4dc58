//! physical: a network card that somebody has moved into the network namespace.
//!
//! Where the machine has an IOMMU, a PCI card is passed to the VM as it is: its
//! driver on the host gives it up for vfio-pci, and gets it back afterwards
//! (Documentation/driver-api/vfio.rst of the kernel). Any other card is tied to the
//! VM like the other kinds.

use std::io;
use std::path::Path;

use super::{Connected, Endpoint};
use crate::sandbox::network::model::{self, Host};
use crate::sandbox::network::snapshot::Link;
use crate::sandbox::network::sysfs::Sysfs;

/// The kernel has no word for it.
pub const KIND: &str = "physical";
const VFIO_DRIVER: &str = "vfio-pci";
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
            return take(sysfs, &address).map(Connected::Passed);
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
fn take(sysfs: &Sysfs, address: &str) -> io::Result<Passed> {
    let device = format!("bus/pci/devices/{address}");
    let driver = sysfs.link(format!("{device}/driver"))?;
    let passed = Passed {
        address: address.to_owned(),
        driver: driver
            .as_deref()
            .and_then(last)
            .filter(|d| d != VFIO_DRIVER),
    };
    sysfs
        .read(format!("{DRIVERS}/{VFIO_DRIVER}/module/refcnt"))
        .or_else(|_| sysfs.read(format!("{DRIVERS}/{VFIO_DRIVER}/uevent")))
        .map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => io::Error::new(
                io::ErrorKind::Unsupported,
                "passing a network card to a virtual machine needs the driver vfio-pci: run modprobe vfio-pci",
            ),
            _ => e,
        })
        .or_else(|e| match e.kind() {
            // It is there, and neither file can be read.
            io::ErrorKind::PermissionDenied => Ok(String::new()),
            _ => Err(e),
        })?;
    bind(sysfs, &passed, VFIO_DRIVER).inspect_err(|_| {
        // The first error is the one to report.
        let _ = give_back_to_driver(sysfs, &passed);
    })?;
    Ok(passed)
}

/// Returns a card to the driver it had.
///
/// # Errors
/// As write(2) to sysfs.
pub fn give_back(host: &mut Host<'_>, passed: &Passed) -> io::Result<()> {
    match host.sysfs {
        Some(sysfs) => give_back_to_driver(sysfs, passed),
        None => Ok(()),
    }
}

fn give_back_to_driver(sysfs: &Sysfs, passed: &Passed) -> io::Result<()> {
    match &passed.driver {
        Some(driver) => bind(sysfs, passed, driver),
        None => Ok(()),
    }
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
