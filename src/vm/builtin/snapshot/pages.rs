//! The guest's memory to a file, without what is zero.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::format::MAX_EXTENTS;
use crate::vm::builtin::memory::Extent;

const PAGE: usize = 4096;
/// What is read at once, and the smallest hole between two extents.
const BLOCK: usize = 64 << 10;

/// Copies the first `size` bytes of the guest's memory to a new file, and says where in it
/// something is.
///
/// # Errors
/// Those of the file system.
pub fn write(memory: &File, size: u64, path: &Path) -> io::Result<Vec<Extent>> {
    let mut options = File::options();
    let file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.set_len(size)?;
    let mut extents: Vec<Extent> = Vec::new();
    let mut block = vec![0; BLOCK];
    let mut at = 0;
    while let Some(data) = next_data(memory, at)?.filter(|data| *data < size) {
        at = data / BLOCK as u64 * BLOCK as u64;
        // The size is a multiple of MiB.
        memory.read_exact_at(&mut block, at)?;
        let mut is_empty = true;
        for (number, page) in block.chunks(PAGE).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(page, at + (number * PAGE) as u64)?;
                is_empty = false;
            }
        }
        let len = BLOCK as u64;
        match extents.last_mut() {
            _ if is_empty => {}
            Some(last) if last.offset + last.len == at => last.len += len,
            _ => extents.push(Extent { offset: at, len }),
        }
        at += len;
    }
    file.sync_all()?;
    Ok(merge(extents))
}

/// Where something is from an offset on; there may be zeros behind it.
fn next_data(memory: &File, at: u64) -> io::Result<Option<u64>> {
    match seek(memory.as_fd(), SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Few enough to be mapped: over the smallest holes if there are too many.
fn merge(mut extents: Vec<Extent>) -> Vec<Extent> {
    let mut hole = BLOCK as u64;
    while extents.len() > MAX_EXTENTS {
        hole *= 2;
        extents.dedup_by(|next, before| {
            let is_near = next.offset - (before.offset + before.len) <= hole;
            if is_near {
                before.len = next.offset + next.len - before.offset;
            }
            is_near
        });
    }
    extents
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::builtin::memory::MemoryFile;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_file_has_what_is_not_zero_and_holes_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let size = 64 << 20;
        let memory = MemoryFile::new(size, 16 << 20).unwrap();
        let memfd = memory.file().unwrap();
        // Data, zeros that take memory, two blocks side by side, the end, and the room.
        for (at, bytes) in [
            (0x5000, &b"one"[..]),
            (8 << 20, &[0; 0x2_0000]),
            ((16 << 20) + 0xfff0, &[1; 0x20]),
            (size - 1, b"e"),
            (size + 0x1000, b"not saved"),
        ] {
            memfd.write_all_at(bytes, at).unwrap();
        }
        let extents = write(memfd, size, &path).unwrap();
        let extent = |offset, len| Extent { offset, len };
        let expected = [
            extent(0, 0x1_0000),
            extent(16 << 20, 0x2_0000),
            extent(size - 0x1_0000, 0x1_0000),
        ];
        assert_eq!(extents, expected);
        let file = File::open(&path).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777), (size, 0o600));
        assert!(metadata.blocks() <= 64, "{}", metadata.blocks());
        let mut saved = vec![0; size as usize];
        let mut original = saved.clone();
        file.read_exact_at(&mut saved, 0).unwrap();
        memfd.read_exact_at(&mut original, 0).unwrap();
        assert!(saved == original);
    }

    #[test]
    fn there_are_never_more_extents_than_can_be_mapped() {
        let far = (1 << 30) + 0x10_0000;
        let many = (0..3 * MAX_EXTENTS as u64).map(|n| Extent {
            offset: n * 0x8_0000 + if n > 10 { far } else { 0 },
            len: 0x1_0000,
        });
        let many: Vec<_> = many.collect();
        let merged = merge(many.clone());
        assert!(merged.len() <= MAX_EXTENTS, "{}", merged.len());
        let covers = |e: &Extent| {
            let inside = |m: &Extent| m.offset <= e.offset && e.offset + e.len <= m.offset + m.len;
            merged.iter().any(inside)
        };
        assert!(many.iter().step_by(1000).all(covers));
        assert!(
            merged
                .windows(2)
                .all(|m| m[0].offset + m[0].len < m[1].offset)
        );
    }
}
