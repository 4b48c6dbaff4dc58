//! Saving a machine that waits before it is anybody's, and making machines of what was
//! saved.
//!
//! A template is a directory with two files. `memory` is as long as the guest's memory, with
//! holes where that is zero; `state` is everything else: registers of the processors and
//! the interrupt controllers, and what drivers have set up of the devices ([`format`]). It
//! also says what it was made for ([`fit`]): a template of another kernel, image, command line,
//! size, runtime or host is not used.
//!
//! Nothing is saved of what is behind the devices, because nothing is there yet: no
//! file system is mounted, no connection open, no network interface attached.
//!
//! The directories belong to who makes machines. What is in them is checked all the same
//! before it is used: a file that was cut off or damaged is an error, and the machine is
//! booted instead.
//!
//! - [`store`]: the directory of all templates
//! - [`pages`]: memory to a file
//! - [`processor`], [`chips`]: what KVM has
//! - [`restore`]: a machine of a template

pub mod chips;
pub mod fit;
pub mod format;
pub mod pages;
mod plain;
pub mod processor;
pub mod restore;
#[cfg(any(test, fuzzing))]
#[allow(clippy::expect_used, clippy::unwrap_used)]
pub mod sample;
pub mod store;

use std::io;
use std::path::{Path, PathBuf};

/// Why a template cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}: {what}", path.display())]
    Invalid { path: PathBuf, what: String },
    #[error("KVM: {operation}: {source}")]
    Kvm {
        operation: &'static str,
        source: io::Error,
    },
    #[error("the {what} cannot be saved: {reason}")]
    Unsavable { what: &'static str, reason: String },
    #[error("the template does not fit: {0}")]
    Misfit(String),
    #[error("what this host is: {0}")]
    Host(io::Error),
}

impl Error {
    pub(super) fn file(path: &Path) -> impl Fn(io::Error) -> Error {
        move |source| Error::File {
            path: path.to_owned(),
            source,
        }
    }

    fn invalid(path: &Path, what: impl Into<String>) -> Error {
        Error::Invalid {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    fn kvm(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
        move |e| Error::Kvm {
            operation,
            source: io::Error::from_raw_os_error(e.errno()),
        }
    }
}
