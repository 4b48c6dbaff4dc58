//! Requests to a disk (VIRTIO 1.2, 5.2.6): header, data, and a byte for the outcome.

use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use super::super::buffers::{self, Buffers};
use super::disk::{Disk, SECTOR, Transfer};
use super::{MAX_RANGE, MAX_RANGES};

/// Types of requests.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const ID_LEN: usize = 20;
const RANGE_LEN: usize = 16;
/// Flag of a range: its space may be given back.
const UNMAP: u32 = 1;

/// Outcomes.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Does what a request asks for; the number of bytes written to the guest. A request
/// without a place for its outcome gets none.
pub fn answer(
    disk: Option<&Disk>,
    serial: &str,
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> u32 {
    let Some((mut readable, mut writable)) = buffers::of_chain(memory, chain) else {
        return 0;
    };
    let Some(status) = writable
        .len()
        .checked_sub(1)
        .and_then(|at| writable.split_off(at))
    else {
        return 0;
    };
    let len = writable.len();
    let (outcome, written) = match (readable.take::<16>(), disk) {
        (Some(header), Some(disk)) => execute(disk, serial, header, &readable, writable),
        // Cut short, or the disk is gone.
        _ => (IO_ERROR, 0),
    };
    status.write(&[outcome]);
    // The status is after the data, so all of that counts as written, if any of it does.
    match outcome {
        OK if written > 0 => u32::try_from(len.saturating_add(1)).unwrap_or(u32::MAX),
        _ => 1,
    }
}

/// The outcome, and how many bytes of data were written to the guest.
fn execute(
    disk: &Disk,
    serial: &str,
    header: [u8; 16],
    readable: &Buffers<'_>,
    writable: Buffers<'_>,
) -> (u8, usize) {
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let kind = u32::from_le_bytes([a, b, c, d]);
    if disk.read_only && matches!(kind, OUT | DISCARD | WRITE_ZEROES) {
        return (IO_ERROR, 0);
    }
    let outcome = |result: std::io::Result<()>| match result {
        Ok(()) => OK,
        Err(e) => {
            log::debug!("disk {serial}: request {kind}: {e}");
            IO_ERROR
        }
    };
    match kind {
        IN => {
            let len = writable.len();
            let Some(offset) = place(disk, sector, len as u64) else {
                return (IO_ERROR, 0);
            };
            (
                outcome(disk.transfer(Transfer::Read, writable, offset)),
                len,
            )
        }
        OUT => {
            let Some(offset) = place(disk, sector, readable.len() as u64) else {
                return (IO_ERROR, 0);
            };
            let written = disk.transfer(Transfer::Write, readable.clone(), offset);
            (outcome(written), 0)
        }
        FLUSH => (outcome(disk.flush()), 0),
        GET_ID => {
            let mut id = [0; ID_LEN];
            let len = serial.len().min(ID_LEN);
            id[..len].copy_from_slice(&serial.as_bytes()[..len]);
            match writable.len() {
                // It ends with a zero only when there is room for one.
                ID_LEN.. => (OK, writable.write(&id)),
                _ => (IO_ERROR, 0),
            }
        }
        DISCARD | WRITE_ZEROES => (ranges(disk, kind, readable, &outcome), 0),
        _ => (UNSUPPORTED, 0),
    }
}

/// Where a range of sectors is, if it is on the disk.
fn place(disk: &Disk, sector: u64, len: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let whole =
        len.is_multiple_of(disk.block_size.into()) && offset.is_multiple_of(disk.block_size.into());
    let end = offset.checked_add(len)?;
    (whole && len > 0 && end <= disk.size).then_some(offset)
}

fn ranges(
    disk: &Disk,
    kind: u32,
    readable: &Buffers<'_>,
    outcome: &impl Fn(std::io::Result<()>) -> u8,
) -> u8 {
    let mut readable = readable.clone();
    let whole = readable.len().is_multiple_of(RANGE_LEN) && readable.len() > 0;
    if !whole || readable.len() / RANGE_LEN > MAX_RANGES as usize {
        return IO_ERROR;
    }
    while let Some(range) = readable.take::<RANGE_LEN>() {
        let u32_at = |at: usize| {
            let [a, b, c, d] = [range[at], range[at + 1], range[at + 2], range[at + 3]];
            u32::from_le_bytes([a, b, c, d])
        };
        let sector = u64::from(u32_at(4)) << 32 | u64::from(u32_at(0));
        let (sectors, flags) = (u32_at(8), u32_at(12));
        // A discard has no flags.
        if flags & !UNMAP != 0 || kind == DISCARD && flags != 0 {
            return UNSUPPORTED;
        }
        let len = u64::from(sectors) * SECTOR;
        let Some(offset) = place(disk, sector, len).filter(|_| sectors <= MAX_RANGE) else {
            return IO_ERROR;
        };
        let done = match kind {
            DISCARD => disk.discard(offset, len),
            _ => disk.write_zeroes(offset, len, flags & UNMAP != 0),
        };
        let done = outcome(done);
        if done != OK {
            return done;
        }
    }
    OK
}
