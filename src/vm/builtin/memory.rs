//! The guest's memory: one memfd, mapped and handed to KVM, faulted in lazily. Or, of a
//! machine that is made of a template, one private mapping of the template's file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, ftruncate, memfd_create};
use serde::{Deserialize, Serialize};
use vm_memory::mmap::NewBitmap;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use super::layout::{HOLE_END, HOLE_START};
use crate::config::HugePages;
use crate::vm::{Error, huge_pages};

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

const PAGE: u64 = 4096;

/// The memory of one guest.
#[derive(Clone, Debug)]
pub struct MemoryFile {
    backing: Backing,
    size: u64,
    room: u64,
    pages: HugePages,
}

#[derive(Clone, Debug)]
enum Backing {
    /// A memfd. Every mapping of it is the same memory.
    Own(Arc<File>),
    /// What a template's file has, until the guest writes to it. There is one mapping,
    /// because what is written is in that and nowhere else.
    Template(Arc<Mapping>),
}

/// Addresses of this process, as long as the value lives.
#[derive(Debug)]
struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: an address range; what is at the addresses is only accessed as guest memory.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeros that take no memory.
    fn new(len: usize) -> io::Result<Mapping> {
        let (none, protection) = (std::ptr::null_mut(), libc::PROT_READ | libc::PROT_WRITE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address the kernel chooses.
        let start = unsafe { libc::mmap(none, len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start.cast();
        Ok(Mapping { start, len })
    }

    /// Puts a part of the file, which is as long as the mapping, into its place.
    fn put(&self, file: &File, extent: Extent) -> io::Result<()> {
        let fits = |end: &u64| *end <= self.len as u64;
        extent
            .offset
            .checked_add(extent.len)
            .filter(fits)
            .ok_or(io::ErrorKind::InvalidData)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let (fd, offset) = (file.as_raw_fd(), extent.offset as usize);
        // SAFETY: what it replaces is a part of this mapping, which nobody uses yet.
        let put = unsafe {
            let at = self.start.add(offset).cast();
            libc::mmap(at, extent.len as usize, protection, flags, fd, offset as _)
        };
        if put == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn advise(&self, offset: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the range is in the mapping (the callers' are), and none of the advice
        // that is given makes it unusable.
        let result =
            unsafe { libc::madvise(self.start.add(offset as usize).cast(), len as usize, advice) };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: whoever maps guest memory of it keeps the value (`MemoryFile::map`).
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// A part of a template's file that has something in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
}

impl MemoryFile {
    /// Memory of this size, and room for so much more.
    ///
    /// # Errors
    /// As memfd_create(2) and ftruncate(2).
    #[cfg(any(test, fuzzing))]
    pub fn new(size: u64, room: u64) -> io::Result<MemoryFile> {
        MemoryFile::of_pages(size, room, HugePages::Off)
    }

    /// As [`MemoryFile::new`], of huge pages. Those that are reserved are there from
    /// the start, as far as they are not part of the room for more.
    ///
    /// # Errors
    /// [`Error::HugePages`] when they are not to be had.
    pub fn of_huge_pages(size: u64, room: u64, pages: HugePages) -> Result<MemoryFile, Error> {
        let file = MemoryFile::of_pages(size, room, pages).map_err(|source| Error::Io {
            context: "cannot create the guest's memory",
            source,
        })?;
        file.reserve(0, size)?;
        Ok(file)
    }

    fn of_pages(size: u64, room: u64, pages: HugePages) -> io::Result<MemoryFile> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let flags = flags
            | match pages {
                HugePages::Off | HugePages::Transparent => MemfdFlags::empty(),
                HugePages::Mib2 => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
                HugePages::Gib1 => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
            };
        let file = memfd_create("guest-memory", flags)?;
        ftruncate(&file, size.saturating_add(room))?;
        // A mapping of a file that shrinks is a way to crash who uses it.
        rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK)?;
        Ok(MemoryFile {
            backing: Backing::Own(Arc::new(file.into())),
            size,
            room,
            pages,
        })
    }

    /// Memory of this size with what a template's file of the same size has in
    /// `extents`, and zeros elsewhere. Nobody sees what is written to it.
    ///
    /// # Errors
    /// As mmap(2); `InvalidData` for extents beyond the size.
    pub fn of_template(
        file: &File,
        extents: &[Extent],
        size: u64,
        room: u64,
    ) -> io::Result<MemoryFile> {
        let len = usize::try_from(size.saturating_add(room)).map_err(io::Error::other)?;
        let mapping = Mapping::new(len)?;
        for extent in extents {
            if extent.offset.saturating_add(extent.len) > size {
                return Err(io::ErrorKind::InvalidData.into());
            }
            mapping.put(file, *extent)?;
        }
        // A child of this process would share it, and have each page copied that
        // either of them writes.
        mapping.advise(0, len as u64, libc::MADV_DONTFORK)?;
        mapping.advise(0, len as u64, libc::MADV_DONTDUMP)?;
        Ok(MemoryFile {
            backing: Backing::Template(Arc::new(mapping)),
            size,
            room,
            pages: HugePages::Off,
        })
    }

    /// Takes the huge pages of a piece of the file, if they are reserved ones: one that
    /// is missing when it is touched is a bus error.
    ///
    /// # Errors
    /// [`Error::HugePages`] when the host has too few.
    pub fn reserve(&self, offset: u64, len: u64) -> Result<(), Error> {
        let (Some(page), Some(file)) = (self.pages.reserved(), self.file()) else {
            return Ok(());
        };
        let flags = rustix::fs::FallocateFlags::KEEP_SIZE;
        let taken = loop {
            match rustix::fs::fallocate(file, flags, offset, len) {
                // It takes long, and a signal is no reason to give up.
                Err(rustix::io::Errno::INTR) => {}
                other => break other,
            }
        };
        taken.map_err(|e| match e {
            rustix::io::Errno::NOSPC | rustix::io::Errno::NOMEM => {
                huge_pages::too_few(page >> 10, len.div_ceil(page), "fewer")
            }
            e => Error::Io {
                context: "cannot take huge pages",
                source: e.into(),
            },
        })
    }

    /// Whether memory can go back to the host, and come again when it is touched.
    pub fn can_discard(&self) -> bool {
        self.pages.reserved().is_none()
    }

    /// Without what may be added.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file, if others can map it.
    pub fn file(&self) -> Option<&File> {
        match &self.backing {
            Backing::Own(file) => Some(file),
            Backing::Template(_) => None,
        }
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
        match &self.backing {
            Backing::Own(file) => self.map_file(file),
            Backing::Template(mapping) => self.map_again(mapping),
        }
    }

    fn map_file<B: NewBitmap>(&self, file: &Arc<File>) -> io::Result<GuestMemoryMmap<B>> {
        let regions = self.all().map(|range| {
            // 64 bits on the only architecture there is.
            let len = range.len as usize;
            let file = FileOffset::from_arc(file.clone(), range.offset);
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
            if self.pages == HugePages::Transparent {
                // SAFETY: as above.
                let result = unsafe { libc::madvise(address, len, libc::MADV_HUGEPAGE) };
                if result != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(memory)
    }

    /// The one mapping, seen as what this caller needs.
    fn map_again<B: NewBitmap>(&self, mapping: &Arc<Mapping>) -> io::Result<GuestMemoryMmap<B>> {
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let regions = self.all().map(|range| {
            let (offset, len) = (range.offset as usize, range.len as usize);
            // SAFETY: inside of the mapping, which is kept below.
            let region = unsafe {
                let start = mapping.start.add(offset);
                MmapRegion::<B>::build_raw(start, len, libc::PROT_READ | libc::PROT_WRITE, flags)
            };
            let region = region.map_err(io::Error::other)?;
            let address = GuestAddress(range.address);
            GuestRegionMmap::new(region, address).ok_or_else(|| io::ErrorKind::InvalidData.into())
        });
        let regions = regions.collect::<io::Result<Vec<_>>>()?;
        // Regions of this kind keep nothing alive, and copies of them are made freely:
        // the mapping stays as long as the process, as does the machine.
        std::mem::forget(mapping.clone());
        GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)
    }

    /// Gives pages back to the host; the guest reads zeros there from now on, or what
    /// its template has there. What is not memory is left out; reserved huge pages stay,
    /// and what is in them.
    ///
    /// # Errors
    /// As fallocate(2) and madvise(2).
    pub fn discard(&self, address: GuestAddress, len: u64) -> io::Result<()> {
        if !self.can_discard() {
            return Ok(());
        }
        for range in self.all() {
            let start = address.raw_value().max(range.address);
            let end = address.raw_value().saturating_add(len);
            let end = end.min(range.address + range.len);
            if start < end {
                self.give_back(start - range.address + range.offset, end - start)?;
            }
        }
        Ok(())
    }

    fn give_back(&self, offset: u64, len: u64) -> io::Result<()> {
        match &self.backing {
            Backing::Own(file) => {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                Ok(rustix::fs::fallocate(&**file, hole, offset, len)?)
            }
            Backing::Template(mapping) => {
                // Whole pages, as of a file: of others the advice would be refused.
                let start = offset.next_multiple_of(PAGE);
                let end = (offset + len) / PAGE * PAGE;
                if start < end {
                    mapping.advise(start, end - start, libc::MADV_DONTNEED)?;
                }
                Ok(())
            }
        }
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
        let blocks =
            std::os::unix::fs::MetadataExt::blocks(&file.file().unwrap().metadata().unwrap());
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
    fn huge_pages_that_are_not_there_are_an_error_and_no_bus_error() {
        // More than any host has.
        let error = MemoryFile::of_huge_pages(1 << 46, 0, HugePages::Mib2);
        assert!(matches!(error, Err(Error::HugePages(_))), "{error:?}");
        let text = error.unwrap_err().to_string();
        assert!(text.contains("33554432 huge pages of 2048 KiB"), "{text}");
        // The room for more takes none.
        let file = MemoryFile::of_pages(2 << 20, 1 << 40, HugePages::Mib2).unwrap();
        let error = file.reserve(2 << 20, 1 << 40);
        assert!(matches!(error, Err(Error::HugePages(_))), "{error:?}");
        assert!(!file.can_discard());
    }

    #[test]
    fn transparent_huge_pages_are_advised() {
        let file = MemoryFile::of_huge_pages(1 << 30, 0, HugePages::Transparent).unwrap();
        let memory = file.map::<()>().unwrap();
        memory.write_obj(7u8, GuestAddress(0x1000)).unwrap();
        let start = memory.iter().next().unwrap().as_ptr() as usize;
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let of_mapping = maps.split(&format!("{start:x}-")).nth(1).unwrap();
        let flags = of_mapping
            .lines()
            .find(|line| line.starts_with("VmFlags"))
            .unwrap();
        assert!(flags.split(' ').any(|flag| flag == "hg"), "{flags}");
        assert!(file.can_discard());
    }

    #[test]
    fn the_file_cannot_change_its_size() {
        let file = MemoryFile::new(1 << 20, 0).unwrap();
        assert!(ftruncate(file.file().unwrap(), 0).is_err());
    }

    fn template(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for at in [0x1000, 0x20_0000] {
            std::os::unix::fs::FileExt::write_all_at(&file, b"template", at).unwrap();
        }
        file
    }

    const EXTENTS: [Extent; 2] = [
        Extent {
            offset: 0x1000,
            len: 0x1000,
        },
        Extent {
            offset: 0x20_0000,
            len: 0x1_0000,
        },
    ];

    #[test]
    fn machines_of_a_template_share_it_and_nothing_they_write() {
        let (size, room) = (4 << 20, 2 << 20);
        let file = template(size);
        let one = MemoryFile::of_template(&file, &EXTENTS, size, room).unwrap();
        let other = MemoryFile::of_template(&file, &EXTENTS, size, room).unwrap();
        let (a, b) = (one.map::<()>().unwrap(), other.map::<()>().unwrap());
        let read = |memory: &GuestMemoryMmap, address| {
            let mut bytes = [0; 8];
            memory
                .read_slice(&mut bytes, GuestAddress(address))
                .unwrap();
            bytes
        };
        assert_eq!(&read(&a, 0x1000), b"template");
        a.write_slice(b"password", GuestAddress(0x1000)).unwrap();
        a.write_slice(b"password", GuestAddress(0x10_0000)).unwrap();
        a.write_slice(b"password", GuestAddress(4 * GIB)).unwrap();
        // Whoever else works on this machine sees it, also with another kind of mapping.
        let again = one.map::<vhost_user_backend::bitmap::BitmapMmapRegion>();
        let mut bytes = [0; 8];
        again
            .unwrap()
            .read_slice(&mut bytes, GuestAddress(0x1000))
            .unwrap();
        assert_eq!(&bytes, b"password");
        assert_eq!(&read(&b, 0x1000), b"template");
        assert_eq!(read(&b, 0x10_0000), [0; 8]);
        assert_eq!(read(&b, 4 * GIB), [0; 8]);
        let third = MemoryFile::of_template(&file, &EXTENTS, size, room).unwrap();
        assert_eq!(&read(&third.map().unwrap(), 0x1000), b"template");
        // Neither beyond its size nor beyond the room.
        assert!(a.write_obj(0u8, GuestAddress(size)).is_err());
        assert!(a.write_obj(0u8, GuestAddress(4 * GIB + room)).is_err());
    }

    #[test]
    fn discarded_pages_of_a_template_are_what_they_were() {
        let size = 4 << 20;
        let memory = MemoryFile::of_template(&template(size), &EXTENTS, size, 2 << 20).unwrap();
        let mapped = memory.map::<()>().unwrap();
        for address in [0x1000, 0x2000, 0x3000, 4 * GIB] {
            mapped.write_obj(7u8, GuestAddress(address)).unwrap();
        }
        memory.discard(GuestAddress(0x1000), 0x1fff).unwrap();
        memory.discard(GuestAddress(4 * GIB), u64::MAX).unwrap();
        let read = |address| mapped.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!((read(0x1000), read(0x2000), read(0x3000)), (b't', 7, 7));
        assert_eq!(read(4 * GIB), 0);
    }

    #[test]
    fn extents_beyond_the_memory_are_refused() {
        let file = template(4 << 20);
        for (offset, len) in [(0, 5 << 20), (4 << 20, 0x1000), (u64::MAX, 0x1000)] {
            let extent = Extent { offset, len };
            let made = MemoryFile::of_template(&file, &[extent], 4 << 20, 1 << 20);
            assert!(made.is_err(), "{extent:?}");
        }
    }
}
