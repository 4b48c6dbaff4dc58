//! A guest's memory between pages that nobody can touch.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use vm_memory::mmap::{MmapRegionBuilder, NewBitmap};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::SIZE;
use crate::vm::builtin::memory::{MemoryFile, Range};

const PAGE: usize = 4096;

/// The address space that the memory is in.
pub struct Reserved {
    start: *mut libc::c_void,
    len: usize,
}

/// As [`MemoryFile::map`]. Nobody may use the memory when the address space has been given
/// back.
pub fn map<B: NewBitmap>(file: &MemoryFile) -> (GuestMemoryMmap<B>, Vec<Reserved>) {
    let first = Range {
        address: 0,
        len: SIZE,
        offset: 0,
    };
    let mut reserved = Vec::new();
    let mut regions = Vec::new();
    for range in std::iter::once(first).chain(file.room()) {
        let space = Reserved::new(range.len as usize + 2 * PAGE);
        let region =
            MmapRegionBuilder::new_with_bitmap(range.len as usize, B::with_len(range.len as usize))
                .with_file_offset(FileOffset::new(clone_of(file), range.offset));
        let start = space.fill(file, range);
        // SAFETY: the mapping was just made, and is as long.
        let region = unsafe { region.with_raw_mmap_pointer(start) };
        let region = region.build().expect("a region");
        regions.push(GuestRegionMmap::new(region, GuestAddress(range.address)).expect("fits"));
        reserved.push(space);
    }
    let memory = GuestMemoryMmap::from_regions(regions).expect("regions in order");
    (memory, reserved)
}

fn clone_of(file: &MemoryFile) -> File {
    let file = file.file().expect("memory of its own");
    file.try_clone().expect("a descriptor")
}

impl Reserved {
    fn new(len: usize) -> Reserved {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping replaces nothing.
        let start = unsafe { libc::mmap(null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Reserved { start, len }
    }

    /// Maps a part of the file, a page from either end.
    fn fill(&self, file: &MemoryFile, range: Range) -> *mut u8 {
        let start = self.start.wrapping_byte_add(PAGE);
        // SAFETY: what is replaced is a part of this reservation, in which nothing is yet.
        let mapped = unsafe {
            libc::mmap(
                start,
                range.len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                clone_of(file).as_raw_fd(),
                range.offset as libc::off_t,
            )
        };
        assert_eq!(mapped, start, "{}", io::Error::last_os_error());
        start.cast()
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and its users are gone.
        unsafe { libc::munmap(self.start, self.len) };
    }
}
