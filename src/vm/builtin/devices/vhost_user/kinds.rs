//! What is particular to each kind of device: its features, queues and configuration
//! space.

use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_FS};

use super::super::{FEATURES, TAG_LEN};
use crate::vm::VhostUserKind;

/// Sizes of queues: what all back ends take, and is enough.
const BLOCK_QUEUE: u16 = 128;
const FS_QUEUE: u16 = 512;
const MAX_BLOCK_QUEUES: u32 = 4;

/// Features of block devices (VIRTIO 1.2, 5.2.3) that the back end alone has to do
/// with: SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, DISCARD,
/// WRITE_ZEROES. Not CONFIG_WCE, for which a driver writes to the configuration.
const BLOCK_FEATURES: u64 =
    1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 14;
const BLOCK_MQ: u64 = 1 << 12;
/// Up to the fields of WRITE_ZEROES, and where the number of queues is.
const BLOCK_CONFIG_LEN: u32 = 60;
const BLOCK_QUEUES_AT: usize = 34;

/// A kind of device.
pub struct Kind {
    pub id: u32,
    /// Features that a back end may offer.
    pub features: u64,
    /// Queues, of which a back end may have fewer if it has `min_queues`.
    pub queues: Vec<u16>,
    pub min_queues: usize,
    pub config: Space,
}

/// Where the configuration space comes from.
pub enum Space {
    Own(Vec<u8>),
    /// The back end's, of this length.
    BackEnd(u32),
}

impl Kind {
    pub fn new(kind: &VhostUserKind, vcpus: u32) -> Kind {
        match kind {
            VhostUserKind::Block => Kind {
                id: VIRTIO_ID_BLOCK,
                features: FEATURES | BLOCK_FEATURES | BLOCK_MQ,
                queues: vec![BLOCK_QUEUE; vcpus.clamp(1, MAX_BLOCK_QUEUES) as usize],
                min_queues: 1,
                config: Space::BackEnd(BLOCK_CONFIG_LEN),
            },
            VhostUserKind::Fs { tag } => {
                let mut space = tag.as_bytes().to_vec();
                space.resize(TAG_LEN, 0);
                // Queues for requests that are not urgent.
                space.extend(1u32.to_le_bytes());
                Kind {
                    id: VIRTIO_ID_FS,
                    features: FEATURES,
                    queues: vec![FS_QUEUE; 2],
                    min_queues: 2,
                    config: Space::Own(space),
                }
            }
        }
    }

    /// Completes features and configuration for a device with so many queues.
    pub fn settle(&self, features: &mut u64, config: &mut [u8], queues: usize) {
        if self.id != VIRTIO_ID_BLOCK {
            return;
        }
        // At most MAX_BLOCK_QUEUES.
        let number = (queues as u16).to_le_bytes();
        if let Some(field) = config.get_mut(BLOCK_QUEUES_AT..BLOCK_QUEUES_AT + 2) {
            field.copy_from_slice(&number);
        }
        if queues == 1 {
            *features &= !BLOCK_MQ;
        }
    }
}
