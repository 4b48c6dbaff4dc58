//! Entry points for fuzz targets of machines and devices, see [`crate::fuzzing`].

pub use super::builtin::fuzzing::{
    balloon, block, console, fs, more_memory, net, registers, rng, snapshot, vhost_user, vsock,
};
pub use super::devices::vsock::fuzzing::packets as vsock_packets;
pub use super::qemu::fuzzing::qmp;
