//! Kernel modules of the packaged kernel, loaded in the order of their names.
//!
//! The image builder numbers them so that each comes after those it needs.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

use super::BootError;
use crate::sys;

const DIR: &str = "/modules/boot";
const NO_PARAMETERS: &CStr = c"";

/// Loads every module of the image, if there are any, and gives their memory
/// back.
pub fn load() -> Result<(), BootError> {
    let entries = match fs::read_dir(DIR) {
        Ok(entries) => entries,
        // The project's own kernel has everything built in.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(BootError::io("reading the modules")(e)),
    };
    let mut paths: Vec<_> = entries
        .collect::<io::Result<Vec<_>>>()
        .map_err(BootError::io("reading the modules"))?
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "ko"))
        .collect();
    paths.sort();
    for path in paths {
        let loaded = File::open(&path).and_then(|file| insert(&file));
        match loaded {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            Err(source) => {
                return Err(BootError::Module {
                    name: path.display().to_string(),
                    source,
                });
            }
        }
        // The rootfs is memory. If it stays, it stays.
        drop(fs::remove_file(&path));
    }
    Ok(())
}

fn insert(file: &File) -> io::Result<()> {
    // SAFETY: the parameters are a C string.
    sys::check(unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            NO_PARAMETERS.as_ptr(),
            0,
        )
    })?;
    Ok(())
}
