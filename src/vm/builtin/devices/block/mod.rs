//! virtio-blk: an image file or a block device of the host (VIRTIO 1.2, 5.2).
//!
//! A queue for each processor, up to a few, with a thread each that does one request
//! after the other: reads and writes go between the disk and the guest's memory
//! without a copy.

mod disk;
#[cfg(any(test, fuzzing))]
#[allow(clippy::expect_used, reason = "a fuzz target fails by panicking")]
pub mod fuzzing;
mod request;

use std::io;
use std::sync::{Arc, RwLock};

use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use self::disk::{Disk, SECTOR};
use super::plugged::{BackEnd, Plugged, worker_thread};
use super::{FEATURES, Planned, work_through};
use crate::vm::BlockDevice;
use crate::vm::builtin::seccomp::Kind;
use crate::vm::builtin::virtio::registers::Identity;
use crate::vm::builtin::virtio::rings::{Events, SharedRings};
use crate::vm::builtin::virtio::worker::{Service, ServiceMemory, ServiceRing};
use crate::vm::devices::vhost_user::PoisonFree;

const QUEUE_SIZE: u16 = 256;
const MAX_QUEUES: u32 = 4;
/// Data buffers of a request: a queue has room for them besides header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Longest range of a discard and a write of zeros, in sectors, and most of them in
/// a request.
const MAX_RANGE: u32 = 1 << 21;
const MAX_RANGES: u32 = 16;

/// Feature bits (5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// The disk, as long as it is attached, and its name.
struct Block {
    disk: RwLock<Option<Disk>>,
    serial: String,
}

impl BackEnd for Block {
    fn disconnect(&self) {
        // Waits for requests that are under way.
        *self.disk.write_unpoisoned() = None;
    }
}

struct Worker {
    block: Arc<Block>,
    memory: ServiceMemory<()>,
}

impl Service for Worker {
    type Bitmap = ();

    fn handle(&self, _event: u16, rings: &[ServiceRing<()>]) -> io::Result<()> {
        let memory = self.memory.memory();
        for ring in rings {
            work_through("disk", ring, &memory, |memory, chain| {
                let disk = self.block.disk.read_unpoisoned();
                request::answer(disk.as_ref(), &self.block.serial, memory, chain)
            });
        }
        Ok(())
    }
}

/// Makes a device of a disk, with a serial number of at most 20 bytes.
///
/// # Errors
/// The kernel's, about the file; no thread or descriptor is to be had.
pub fn plug(
    memory: &GuestMemoryMmap,
    vcpus: u32,
    serial: &str,
    device: &BlockDevice,
) -> io::Result<Plugged> {
    let disk = Disk::new(device)?;
    let queues = vcpus.clamp(1, MAX_QUEUES) as usize;
    let identity = identity(&disk, queues);
    let block = Arc::new(Block {
        disk: RwLock::new(Some(disk)),
        serial: serial.to_owned(),
    });
    let memory = GuestMemoryAtomic::new(memory.clone());
    let events = Arc::new(Events::new(queues)?);
    let rings = SharedRings::new(&memory, &identity.queues, events.clone())?;
    let mut handles = Vec::new();
    for queue in 0..queues {
        let worker = Worker {
            block: block.clone(),
            memory: memory.clone(),
        };
        let ring = vec![rings.rings()[queue].clone()];
        let queues = queue..queue + 1;
        handles.push(worker_thread(
            "disk",
            Kind::Device,
            worker,
            ring,
            &events,
            queues,
        )?);
    }
    Ok(Plugged {
        planned: Planned {
            identity,
            rings: Box::new(rings),
            events,
        },
        handles,
        back_end: block,
    })
}

fn identity(disk: &Disk, queues: usize) -> Identity {
    use feature::{BLK_SIZE, DISCARD, FLUSH, MQ, RO, SEG_MAX, WRITE_ZEROES};
    let mut features = FEATURES | SEG_MAX | BLK_SIZE | FLUSH;
    features |= match disk.read_only {
        true => RO,
        false => DISCARD | WRITE_ZEROES,
    };
    if queues > 1 {
        features |= MQ;
    }
    Identity {
        id: VIRTIO_ID_BLOCK,
        features,
        queues: vec![QUEUE_SIZE; queues],
        config: config(disk, queues).into(),
    }
}

/// The configuration space (5.2.4).
fn config(disk: &Disk, queues: usize) -> Vec<u8> {
    let mut config = vec![0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    let alignment = disk.block_size / SECTOR as u32;
    put(0, &(disk.size / SECTOR).to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &disk.block_size.to_le_bytes());
    // At most MAX_QUEUES.
    put(34, &(queues as u16).to_le_bytes());
    for (at, value) in [(36, MAX_RANGE), (40, MAX_RANGES), (44, alignment)] {
        put(at, &value.to_le_bytes());
    }
    for (at, value) in [(48, MAX_RANGE), (52, MAX_RANGES)] {
        put(at, &value.to_le_bytes());
    }
    // Space may be given back when zeros are written.
    put(56, &[1]);
    config
}

#[cfg(test)]
mod tests;
