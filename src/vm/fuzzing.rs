//! Entry points for fuzz targets of machines and devices, see [`crate::fuzzing`].

pub use super::builtin::fuzzing::{
    balloon, block, fs, more_memory, net, registers, rng, snapshot, vsock,
};
pub use super::devices::vsock::fuzzing::packets as vsock_packets;
pub use super::qemu::fuzzing::qmp;
