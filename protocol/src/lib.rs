//! What the host and the guest agent of kuasar-runv say to each other.
//!
//! Seven kinds of connection cross the VM's vsock device. On the host each one
//! is a unix stream socket of the sandbox directory:
//!
//! | port | opened by | carries |
//! |---|---|---|
//! | [`AGENT_PORT`] | host | ttrpc, the services of `proto/*.proto` |
//! | [`DEBUG_CONSOLE_PORT`] | host | a shell, only when enabled in the configuration |
//! | [`STREAM_PORT`] | host (stand-in) | one stdio stream or the control channel of one guest process, see [`stream`] |
//! | [`EVENT_PORT`] | guest | length-prefixed `Event` messages, the first is `Ready`, see [`event`]; the other way `FromHost` messages |
//! | [`LOOPBACK_PORT`] | host (sandboxer) | what lies between the loopback interfaces of host and guest, see [`loopback`] |
//! | [`SOCKET_PORT`] | guest | what a process of a container says to a socket of the host, see [`socket`] |
//! | [`TEMPLATE_PORT`] | guest, then host | what makes a machine a template, and itself again, see [`template`] |
//!
//! Both sides are built from one commit; [`PROTOCOL_VERSION`] is checked in
//! `Ready` so that a stale guest image is reported instead of misunderstood.
//!
//! [`hook`] and [`rtnetlink`] are what both sides do instead of say.

pub mod event;
pub mod hook;
pub mod loopback;
pub mod namespace;
pub mod rtnetlink;
pub mod seccomp;
pub mod socket;
pub mod stream;
pub mod template;
pub mod words;

#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
mod generated {
    pub mod agent;
    pub mod agent_ttrpc;
    pub mod network;
    pub mod network_ttrpc;
    pub mod resources;
    pub mod resources_ttrpc;
    pub mod storage;
    pub mod storage_ttrpc;
}

pub use generated::{
    agent, agent_ttrpc, network, network_ttrpc, resources, resources_ttrpc, storage, storage_ttrpc,
};

/// Bumped with every incompatible change of anything in this crate.
pub const PROTOCOL_VERSION: u32 = 5;

/// The guest's context id. Each VM has a vsock device of its own, so all can
/// use the same.
pub const GUEST_CID: u32 = 3;

/// vsock ports, see the table above.
pub const AGENT_PORT: u32 = 1024;
pub const DEBUG_CONSOLE_PORT: u32 = 1025;
pub const STREAM_PORT: u32 = 1026;
pub const EVENT_PORT: u32 = 1027;
pub const SOCKET_PORT: u32 = 1028;
pub const LOOPBACK_PORT: u32 = 1029;
pub const TEMPLATE_PORT: u32 = 1030;

/// Annotation of a config.json on its way to the guest: the bundle's path on the
/// host, which the state of `startContainer` hooks names. The guest takes it out.
pub const BUNDLE_ANNOTATION: &str = "io.kuasar.runv.bundle";

/// Most processes of a container that are listed, and bytes of the arguments of
/// each. Together they stay below ttrpc's 4 MiB for a message.
pub const MAX_PROCESSES: usize = 1024;
pub const MAX_ARGS_LEN: usize = 3072;

/// virtio-fs tag of the pod's one shared directory and where the agent mounts it.
pub const SHARE_TAG: &str = "kuasar-share";
pub const GUEST_SHARE_DIR: &str = "/run/kuasar/share";

/// Directory of the share with the volumes, which belong to the pod and not to one
/// of its containers. No container id has this character.
pub const VOLUMES_DIR: &str = "@volumes";

/// Where the agent makes the pod's volumes that live in the guest.
pub const GUEST_VOLUMES_DIR: &str = "/run/kuasar/volumes";
/// Where the agent mounts the memory that containers share.
pub const GUEST_SHM_DIR: &str = "/run/kuasar/shm";

/// Kernel command line parameters the agent reads.
pub mod cmdline {
    /// `kuasar.log=error|warn|info|debug|trace`; default `info`.
    pub const LOG_LEVEL: &str = "kuasar.log";
    /// `kuasar.debug_console=1` serves a shell on `DEBUG_CONSOLE_PORT`.
    pub const DEBUG_CONSOLE: &str = "kuasar.debug_console";
    /// `kuasar.template=1` has the agent wait to be saved, see [`crate::template`].
    pub const TEMPLATE: &str = "kuasar.template";
    pub const TEMPLATE_ON: &str = "kuasar.template=1";
}
