//! What is particular to each kind of device: its features, queues and configuration
//! space.

use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_NET};

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

/// Features of network cards (VIRTIO 1.2, 5.1.3) that driver and back end alone have to do
/// with: CSUM, GUEST_CSUM, GUEST_TSO4, _TSO6, _ECN, _UFO, HOST_TSO4, _TSO6, _ECN, _UFO,
/// MRG_RXBUF. Not those of the control queue, which would be this process's to serve.
const NET_FEATURES: u64 = 0b11 | 0xff80;
/// MAC and STATUS are about the configuration, which is not the back end's.
const NET_OWN_FEATURES: u64 = 1 << 5 | 1 << 16;
const NET_QUEUE: u16 = 256;
/// Where the status is in the configuration, and that the link is up.
const NET_STATUS_AT: usize = 6;
const LINK_UP: u16 = 1;

/// A kind of device.
pub struct Kind {
    pub id: u32,
    /// Features that a back end may offer.
    pub features: u64,
    /// Features that the device has whatever the back end says.
    pub own_features: u64,
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
                own_features: 0,
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
                    own_features: 0,
                    queues: vec![FS_QUEUE; 2],
                    min_queues: 2,
                    config: Space::Own(space),
                }
            }
            VhostUserKind::Net { mac } => {
                let mut space = mac.to_vec();
                space.extend(LINK_UP.to_le_bytes());
                Kind {
                    id: VIRTIO_ID_NET,
                    features: FEATURES | NET_FEATURES,
                    own_features: NET_OWN_FEATURES,
                    // What is received, what is sent.
                    queues: vec![NET_QUEUE; 2],
                    min_queues: 2,
                    config: Space::Own(space),
                }
            }
        }
    }

    /// What the driver finds in the configuration, as offset and value, when the back end is
    /// lost. Drivers of network cards look at it, and not at whether the device needs a reset.
    pub fn when_lost(&self) -> Option<(usize, u16)> {
        (self.id == VIRTIO_ID_NET).then_some((NET_STATUS_AT, 0))
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
