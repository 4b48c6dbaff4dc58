//! A disk in memory for [`crate::fuzzing`].

use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, RwLock};

use rustix::fs::{MemfdFlags, memfd_create};

use super::super::fuzzing::{Conduct, Driver, any, memory_file};
use super::disk::Disk;
use super::{BackEnd, Block, Service, ServiceRing, Worker};
use crate::fuzzing::Input;
use crate::vm::BlockDevice;

const SIZE: u64 = 128 * 512;
const FILL: u8 = 0x5a;
const QUEUES: usize = 2;

/// Requests to a disk that may be read-only, want its I/O aligned, and be taken away.
pub fn block(conduct: &mut impl Conduct) {
    let how = conduct.variant();
    let file = std::fs::File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file"));
    file.write_all_at(&[FILL; SIZE as usize], 0)
        .expect("memory");
    let device = BlockDevice {
        file: file.try_clone().expect("a descriptor").into(),
        read_only: how & 1 != 0,
        is_device: false,
    };
    let mut disk = Disk::new(&device).expect("a disk");
    if how & 2 != 0 {
        disk.demand_alignment(512);
    }
    let block = Arc::new(Block {
        disk: RwLock::new(Some(disk)),
        serial: "serial".to_owned(),
    });
    let mut driver = Driver::new(&memory_file(0), QUEUES);
    let worker = Worker {
        block: block.clone(),
        memory: driver.memory.clone(),
    };
    let mut work = |queue: u16, rings: &[ServiceRing<()>]| {
        let ring = usize::from(queue);
        let ring = rings.get(ring..=ring).unwrap_or_default();
        worker.handle(0, ring).expect("the device goes on");
    };
    // Rarely, for it is the end of the rest.
    let mut host = |input: &mut Input<'_>| {
        if input.byte() == 0xd1 {
            block.disconnect();
        }
    };
    conduct.conduct(&mut driver, &mut content, &mut work, &mut host);
    assert_eq!(file.metadata().expect("its metadata").size(), SIZE);
    if how & 1 != 0 {
        let mut bytes = vec![0; SIZE as usize];
        file.read_exact_at(&mut bytes, 0)
            .expect("as long as before");
        assert!(bytes.iter().all(|byte| *byte == FILL), "it was read-only");
    }
}

/// Headers and ranges, as far as the lengths are theirs.
fn content(input: &mut Input<'_>, len: usize) -> Vec<u8> {
    let how = input.byte();
    if len != 16 || how & 0x80 != 0 {
        return any(input, len);
    }
    let kind = [0, 1, 4, 8, 11, 13, 0, 1][usize::from(how & 7)];
    let sector = u64::from(input.byte() % 130);
    let mut bytes = vec![0; 16];
    if how & 8 == 0 {
        bytes[0] = kind;
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
    } else {
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8] = input.byte();
        bytes[12] = how >> 4 & 1;
    }
    bytes
}
