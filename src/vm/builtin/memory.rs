//! The guest's memory: one memfd, mapped and handed to KVM, faulted in lazily.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, ftruncate, memfd_create};
use vm_memory::mmap::NewBitmap;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
};

use super::layout::{HOLE_END, HOLE_START};

/// A piece of the guest's memory: its address, its length, and its place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub address: u64,
    pub len: u64,
    pub offset: u64,
}

/// Where `size` bytes of memory are, with the hole for devices left out.
pub fn ranges(size: u64) -> Vec<Range> {
    let low = size.min(HOLE_START);
    let mut ranges = vec![Range {
        address: 0,
        len: low,
        offset: 0,
    }];
    if size > low {
        ranges.push(Range {
            address: HOLE_END,
            len: size - low,
            offset: low,
        });
    }
    ranges
}

/// Memory that is added begins at a multiple of this: Linux adds it in pieces whose
/// size depends on the machine's, and this is a multiple of all of them.
const ROOM_ALIGNMENT: u64 = HOLE_END;

/// The file behind the memory of one guest.
#[derive(Clone, Debug)]
pub struct MemoryFile {
    file: Arc<File>,
    size: u64,
    room: u64,
}

impl MemoryFile {
    /// Memory of this size, and room for so much more.
    ///
    /// # Errors
    /// As memfd_create(2) and ftruncate(2).
    pub fn new(size: u64, room: u64) -> io::Result<MemoryFile> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("guest-memory", flags)?;
        ftruncate(&file, size.saturating_add(room))?;
        // A mapping of a file that shrinks is a way to crash who uses it.
        rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK)?;
        Ok(MemoryFile {
            file: Arc::new(file.into()),
            size,
            room,
        })
    }

    #[cfg(any(test, fuzzing))]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Without what may be added.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where memory may be added.
    pub fn room(&self) -> Option<Range> {
        let end = ranges(self.size)
            .last()
            .map_or(0, |range| range.address + range.len);
        (self.room > 0).then_some(Range {
            address: end.next_multiple_of(ROOM_ALIGNMENT),
            len: self.room,
            offset: self.size,
        })
    }

    fn all(&self) -> impl Iterator<Item = Range> {
        ranges(self.size).into_iter().chain(self.room())
    }

    /// A mapping of the whole memory and the room for more. Mappings share their pages; each device may
    /// have the kind it needs.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn map<B: NewBitmap>(&self) -> io::Result<GuestMemoryMmap<B>> {
        let regions = self.all().map(|range| {
            // 64 bits on the only architecture there is.
            let len = range.len as usize;
            let file = FileOffset::from_arc(self.file.clone(), range.offset);
            (GuestAddress(range.address), len, Some(file))
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(regions).map_err(io::Error::other)?;
        for region in memory.iter() {
            let address = region.as_ptr().cast();
            let len = region.len() as usize;
            // SAFETY: the range is a mapping that was just made, and the advice
            // changes nothing about its content.
            let result = unsafe { libc::madvise(address, len, libc::MADV_DONTDUMP) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(memory)
    }

    /// Gives pages back to the host; the guest reads zeros there from now on.
    /// What is not memory is left out.
    ///
    /// # Errors
    /// As fallocate(2).
    pub fn discard(&self, address: GuestAddress, len: u64) -> io::Result<()> {
        for range in self.all() {
            let start = address.raw_value().max(range.address);
            let end = address.raw_value().saturating_add(len);
            let end = end.min(range.address + range.len);
            if start < end {
                rustix::fs::fallocate(
                    &*self.file,
                    rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
                    start - range.address + range.offset,
                    end - start,
                )?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_beyond_the_hole_is_continued_above_it() {
        let lens = |size| ranges(size).iter().map(|r| r.len).collect::<Vec<_>>();
        assert_eq!(lens(GIB), [GIB]);
        assert_eq!(lens(3 * GIB), [3 * GIB]);
        assert_eq!(lens(6 * GIB), [3 * GIB, 3 * GIB]);
        let above = ranges(6 * GIB)[1];
        assert_eq!((above.address, above.offset), (4 * GIB, 3 * GIB));
    }

    #[test]
    fn there_is_room_above_everything_else() {
        let room = |size, room| MemoryFile::new(size, room).unwrap().room();
        assert_eq!(room(GIB, 0), None);
        let at = |address, offset| {
            Some(Range {
                address,
                len: 2 * GIB,
                offset,
            })
        };
        assert_eq!(room(GIB, 2 * GIB), at(4 * GIB, GIB));
        assert_eq!(room(6 * GIB, 2 * GIB), at(8 * GIB, 6 * GIB));
        let file = MemoryFile::new(GIB, 2 * GIB).unwrap();
        let memory = file.map::<()>().unwrap();
        memory.write_obj(7u8, GuestAddress(6 * GIB - 1)).unwrap();
        assert!(memory.write_obj(7u8, GuestAddress(6 * GIB)).is_err());
        file.discard(GuestAddress(5 * GIB), GIB).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(6 * GIB - 1)).unwrap(), 0);
    }

    #[test]
    fn mappings_share_their_pages_and_take_none_that_is_not_touched() {
        let file = MemoryFile::new(6 * GIB, 0).unwrap();
        let one = file.map::<()>().unwrap();
        let other = file.map::<()>().unwrap();
        for address in [0x1000, 4 * GIB, 7 * GIB - 8] {
            one.write_obj(address, GuestAddress(address)).unwrap();
            let read: u64 = other.read_obj(GuestAddress(address)).unwrap();
            assert_eq!(read, address);
        }
        assert!(one.write_obj(0u64, GuestAddress(HOLE_START)).is_err());
        assert!(one.write_obj(0u64, GuestAddress(7 * GIB)).is_err());
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.file.metadata().unwrap());
        assert!(blocks <= 3 * 8, "{blocks}");
    }

    #[test]
    fn discarded_pages_are_zero_and_nothing_else_is() {
        let file = MemoryFile::new(4 * GIB, 0).unwrap();
        let memory = file.map::<()>().unwrap();
        for address in [0x1000u64, 0x2000, 4 * GIB] {
            memory.write_obj(7u8, GuestAddress(address)).unwrap();
        }
        file.discard(GuestAddress(0x1000), 0x1000).unwrap();
        file.discard(GuestAddress(2 * GIB), u64::MAX).unwrap();
        let read = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!((read(0x1000), read(0x2000), read(4 * GIB)), (0, 7, 0));
    }

    #[test]
    fn the_file_cannot_change_its_size() {
        let file = MemoryFile::new(1 << 20, 0).unwrap();
        assert!(ftruncate(&*file.file, 0).is_err());
    }
}
