//! The record of one pod's VM: which processes there are to end.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::container::state::{RecordError, read_record, write_record};
use crate::root::Root;
use crate::sys::process::{ProcessRef, boot_id};
use crate::vm::VmSize;

const FILE: &str = "sandbox.json";
/// Version of the layout of `sandbox.json`.
const SCHEMA: u32 = 1;

/// `sandbox.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxRecord {
    pub schema: u32,
    pub boot_id: String,
    pub id: String,
    /// Longest wait for an answer of the agent, in seconds, as configured when
    /// the VM was booted.
    pub agent_timeout_s: u32,
    /// What the VM may grow to; not in records of versions that could not let it.
    #[serde(default)]
    pub most: Option<VmSize>,
    /// Host cgroups its processes are in, to be removed with it.
    pub cgroups: Vec<PathBuf>,
    pub sandboxer: Option<ProcessRef>,
    /// The hypervisor, where it is a process of its own.
    pub vm: Option<ProcessRef>,
}

impl SandboxRecord {
    /// # Errors
    /// When /proc is not mounted.
    pub fn new(id: &str, agent_timeout_s: u32, cgroups: &[PathBuf]) -> io::Result<SandboxRecord> {
        Ok(SandboxRecord {
            schema: SCHEMA,
            boot_id: boot_id()?,
            id: id.to_owned(),
            agent_timeout_s,
            most: None,
            cgroups: cgroups.to_owned(),
            sandboxer: None,
            vm: None,
        })
    }

    #[must_use]
    pub fn path(root: &Root, id: &str) -> PathBuf {
        root.sandbox(id).join(FILE)
    }

    /// # Errors
    /// See [`RecordError`].
    pub fn read(root: &Root, id: &str) -> Result<SandboxRecord, RecordError> {
        read_record(&Self::path(root, id), SCHEMA)
    }

    /// # Errors
    /// See [`RecordError`].
    pub fn write(&self, root: &Root) -> Result<(), RecordError> {
        write_record(&Self::path(root, &self.id), self)
    }

    /// Whether the VM can still run anything.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.sandboxer.is_some_and(ProcessRef::is_alive) && self.vm.is_none_or(ProcessRef::is_alive)
    }
}
