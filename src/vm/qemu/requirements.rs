//! What has to be there before a machine can be started, and how it will be run.

use std::fs::File;
use std::io;
use std::path::Path;

use super::command_line::Accel;
use crate::config;
use crate::vm::{Error, detect};

const INSTALL_QEMU: &str = "install the package qemu-system-x86, or set qemu.path in config.toml";
const INSTALL_FIRMWARE: &str =
    "it comes with the package qemu-system-data; or set qemu.firmware in config.toml";
const INSTALL_GUEST: &str = "install kernel and image with `make install`, or set guest.kernel and guest.image in config.toml";

/// The QEMU binary can be executed.
///
/// # Errors
/// [`Error::File`].
pub fn program(qemu: &config::Qemu) -> Result<(), Error> {
    let path = &qemu.path;
    open("QEMU binary", path, INSTALL_QEMU)?;
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK).map_err(|e| Error::File {
        what: "QEMU binary",
        path: path.clone(),
        source: e.into(),
        hint: INSTALL_QEMU,
    })
}

/// The firmware can be read.
///
/// # Errors
/// [`Error::File`].
pub fn firmware(qemu: &config::Qemu) -> Result<(), Error> {
    open("firmware", &qemu.firmware, INSTALL_FIRMWARE).map(drop)
}

/// The guest's kernel.
///
/// # Errors
/// [`Error::File`].
pub fn kernel(path: &Path) -> Result<File, Error> {
    open("guest kernel", path, INSTALL_GUEST)
}

/// The guest's initramfs.
///
/// # Errors
/// [`Error::File`].
pub fn image(path: &Path) -> Result<File, Error> {
    open("guest image", path, INSTALL_GUEST)
}

fn open(what: &'static str, path: &Path, hint: &'static str) -> Result<File, Error> {
    let unusable = |source| Error::File {
        what,
        path: path.to_owned(),
        source,
        hint,
    };
    let file = File::open(path).map_err(unusable)?;
    if file.metadata().map_err(unusable)?.is_file() {
        Ok(file)
    } else {
        Err(unusable(io::Error::other("not a file")))
    }
}

/// KVM works; `wanted` is what asks for it.
///
/// # Errors
/// [`Error::KvmUnusable`].
pub fn kvm(wanted: &'static str, cache_dir: &Path) -> Result<(), Error> {
    match detect::kvm(cache_dir) {
        detect::KvmStatus::Usable => Ok(()),
        status => Err(Error::KvmUnusable {
            wanted,
            reason: status.to_string(),
        }),
    }
}

/// How the guest's instructions are executed.
///
/// # Errors
/// [`Error::KvmUnusable`] when the configuration insists on KVM.
pub(super) fn accel(wanted: config::Accel, cache_dir: &Path) -> Result<Accel, Error> {
    match wanted {
        config::Accel::Tcg => {}
        config::Accel::Kvm => return kvm("qemu.accel = \"kvm\"", cache_dir).map(|()| Accel::Kvm),
        config::Accel::Auto => match detect::kvm(cache_dir) {
            detect::KvmStatus::Usable => return Ok(Accel::Kvm),
            status => log::debug!("emulating, because KVM is not used: {status}"),
        },
    }
    Ok(Accel::Tcg {
        tsc_khz: detect::tsc_frequency_khz(cache_dir),
    })
}
