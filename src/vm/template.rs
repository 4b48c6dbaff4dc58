//! Saved machines, as others see them; `builtin::snapshot` has what they are.

use serde::Serialize;

use super::{VmConfig, VmSize, builtin};

pub use builtin::snapshot::Error;
pub use builtin::snapshot::store::{New, Store};

use builtin::snapshot::fit::MadeFor;

/// A template there is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    pub key: String,
    pub status: Status,
    /// Why it is stale or broken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Seconds since 1970; not of a broken one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<u64>,
    /// Of its machines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<VmSize>,
    /// Bytes on disk.
    pub disk: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Machines of this configuration are made of it.
    Current,
    /// It fits another configuration.
    Other,
    /// What it was made for has changed.
    Stale,
    /// It cannot be read.
    Broken,
}

/// The key of the template that a machine would be made of.
///
/// # Errors
/// A file that is not there, or a question that KVM does not answer.
pub fn key(config: &VmConfig) -> Result<String, Error> {
    Ok(MadeFor::now(config)?.key())
}

/// All there are. `config` is that of a machine as it would be booted now.
///
/// # Errors
/// The directory cannot be read.
pub fn list(store: &Store, config: &VmConfig) -> Result<Vec<Listed>, Error> {
    // Without KVM none fits.
    let now = MadeFor::now(config).ok();
    let listed = |entry: builtin::snapshot::store::Entry| {
        let (status, reason) = match &entry.state {
            Err(e) => (Status::Broken, Some(e.to_string())),
            Ok(state) if now.as_ref() == Some(&state.made_for) => (Status::Current, None),
            Ok(state) => match state.made_for.stale() {
                Some(reason) => (Status::Stale, Some(reason.to_owned())),
                None => (Status::Other, None),
            },
        };
        let state = entry.state.as_ref().ok();
        Listed {
            created: state.map(|state| state.created),
            size: state.map(|state| state.made_for.size),
            key: entry.key,
            status,
            reason,
            disk: entry.disk,
        }
    };
    Ok(store.list()?.into_iter().map(listed).collect())
}
