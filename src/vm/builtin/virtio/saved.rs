//! What is saved of a virtio device: what its driver has set up. What is behind it is the
//! owner's to make anew.

use serde::{Deserialize, Serialize};

use super::registers::QueueSetup;

/// The device of a slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDevice {
    /// What the device was, so that it can be seen whether it is the same.
    pub id: u32,
    pub offered: u64,
    pub queue_sizes: Vec<u16>,
    pub driver: SavedDriver,
}

/// What its driver has said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDriver {
    pub status: u32,
    pub device_features_select: u32,
    pub driver_features_select: u32,
    pub features: u64,
    pub queue_select: u32,
    pub queues: Vec<QueueSetup>,
    /// Where the device is in each of them, if it runs.
    pub positions: Vec<Position>,
}

/// Indices of a queue as the device counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    pub available: u16,
    pub used: u16,
}

/// Why a saved device cannot be the one in a slot.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Unfit {
    #[error("it is another device")]
    Device,
    #[error("its driver has asked for what there is not")]
    Driver,
    #[error("its queues are not ones")]
    Queues,
    #[error("it cannot be saved in the middle of its work")]
    Unsavable,
}
