//! A container's network: what engines put into its network namespace on the host
//! becomes network cards of the VM (docs/network.md).
//!
//! ```text
//!  network namespace of the container          VM
//!  ┌──────────────────────────────┐   ┌─────────────────────────┐
//!  │ eth0 ◀── tc ──▶ runv0 ◀──────┼───┼──▶ virtio-net "eth0"    │
//!  │  (veth, ...)     (tap)       │   │    in the container's   │
//!  │                              │   │    network namespace    │
//!  └──────────────────────────────┘   └─────────────────────────┘
//! ```
//!
//! One thread per container that has a network namespace of its own ([`watch`]):
//! it reads what is there ([`snapshot`]), connects what is new ([`endpoint`],
//! [`model`]), tells the agent what the guest's side is to be ([`guest`]), and does
//! so again whenever the kernel has news. What the guest listens on can be reached from
//! within the namespace, and the other way round an engine's name server ([`loopback`]).

mod cards;
mod endpoint;
mod guest;
mod loopback;
mod model;
pub mod namespace;
pub mod served;
mod snapshot;
mod sysfs;
pub mod tap;
pub mod watch;

/// Most interfaces of one container that are connected.
pub const MAX_INTERFACES: usize = crate::vm::MAX_DEVICES;

pub use endpoint::physical::give_all_back as give_hardware_back;
