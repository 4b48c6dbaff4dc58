//! Labels of the host's security modules: AppArmor profiles and SELinux labels.
//!
//! Engines on a host with such a module give every container one of their own
//! accord. They confine a process to its container on a kernel it shares with the
//! host; here it shares none, and the boundary of the virtual machine stands in for
//! them, so they are accepted and not applied. A host without the module refuses
//! them, in runc's words.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// A label of a module that the host does not have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    #[error(
        "unable to start container process: unable to apply apparmor profile: apparmor failed to apply profile {0:?}: AppArmor is disabled or not supported"
    )]
    AppArmor(String),
    #[error("selinux label is specified in config, but selinux is disabled or not supported")]
    SeLinux,
}

/// Checks `process.apparmorProfile`.
///
/// # Errors
/// [`Unavailable::AppArmor`].
pub fn check_apparmor(profile: Option<&str>) -> Result<(), Unavailable> {
    let has_apparmor = || {
        fs::read_to_string("/sys/module/apparmor/parameters/enabled")
            .is_ok_and(|enabled| enabled.starts_with('Y'))
    };
    match profile {
        // "unconfined" is what the process is.
        None | Some("" | "unconfined") => Ok(()),
        Some(_) if has_apparmor() => Ok(()),
        Some(profile) => Err(Unavailable::AppArmor(profile.to_owned())),
    }
}

/// Checks `process.selinuxLabel` or `linux.mountLabel`.
///
/// # Errors
/// [`Unavailable::SeLinux`].
pub fn check_selinux(label: Option<&str>) -> Result<(), Unavailable> {
    match label {
        None | Some("") => Ok(()),
        Some(_) if Path::new("/sys/fs/selinux/status").exists() => Ok(()),
        Some(_) => Err(Unavailable::SeLinux),
    }
}

/// Takes the labels out of the `process` the guest gets.
pub fn strip(process: &mut Value) {
    if let Some(fields) = process.as_object_mut() {
        fields.remove("apparmorProfile");
        fields.remove("selinuxLabel");
    }
}
