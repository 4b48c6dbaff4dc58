//! What drivers read of the registers: memory of this process that the guest may read,
//! so that reading takes no exit. Writes of the guest to it are exits as before
//! (KVM's API documentation, 4.35, `KVM_MEM_READONLY`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{MmapRegion, VolatileMemory};

use crate::vm::builtin::layout::VIRTIO_SIZE;

/// Bytes of a page.
const SIZE: usize = VIRTIO_SIZE as usize;

/// The pages of all slots, one behind the other.
#[derive(Debug)]
pub struct Pages(Arc<MmapRegion>);

impl Pages {
    /// # Errors
    /// As mmap(2).
    pub fn new(slots: usize) -> std::io::Result<Pages> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // Shared: a page is the same one when this process has forked.
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let region = MmapRegion::build(None, slots * SIZE, protection, flags);
        Ok(Pages(Arc::new(region.map_err(std::io::Error::other)?)))
    }

    /// `None` beyond the last slot.
    pub fn page(&self, slot: usize) -> Option<Page> {
        let start = slot.checked_mul(SIZE)?;
        (start < self.0.size()).then(|| Page {
            region: self.0.clone(),
            start,
        })
    }

    /// Address in this process, and length in bytes.
    pub fn place(&self) -> (u64, u64) {
        (self.0.as_ptr() as u64, self.0.size() as u64)
    }
}

/// The page of a slot.
#[derive(Clone, Debug)]
pub struct Page {
    region: Arc<MmapRegion>,
    start: usize,
}

impl Page {
    /// Changes a register, at a multiple of 4 in the page.
    pub fn show(&self, offset: u64, value: u32) {
        let at = self.start.saturating_add(offset as usize);
        if let Ok(register) = self.region.get_atomic_ref::<AtomicU32>(at) {
            register.store(value.to_le(), Ordering::Release);
        }
    }

    /// Changes bytes, as far as they are in the page.
    pub fn show_bytes(&self, offset: u64, bytes: &[u8]) {
        if let Some((at, len)) = self.part(offset, bytes.len())
            && let Ok(part) = self.region.get_slice(at, len)
        {
            part.copy_from(&bytes[..len]);
        }
    }

    /// Makes everything zero.
    pub fn clear(&self) {
        self.show_bytes(0, &[0; SIZE]);
    }

    /// What the guest reads; zeros beyond the page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((at, len)) = self.part(offset, data.len())
            && let Ok(part) = self.region.get_slice(at, len)
        {
            part.copy_to(&mut data[..len]);
        }
    }

    /// Where in the region `len` bytes are, and how many of them are in the page.
    fn part(&self, offset: u64, len: usize) -> Option<(usize, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let left = SIZE.checked_sub(offset)?;
        Some((self.start + offset, len.min(left)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_ends_where_the_next_begins() {
        let pages = Pages::new(2).unwrap();
        let [first, second] = [0, 1].map(|slot| pages.page(slot).unwrap());
        assert!(pages.page(2).is_none() && pages.page(usize::MAX).is_none());
        first.show_bytes(SIZE as u64 - 2, &[1, 2, 3, 4]);
        first.show_bytes(u64::MAX, &[5]);
        second.show(4, 0x0403_0201);
        let mut data = [9; 4];
        first.read(SIZE as u64 - 2, &mut data);
        assert_eq!(data, [1, 2, 0, 0]);
        for (page, offset) in [(&first, SIZE as u64), (&first, u64::MAX), (&second, 0)] {
            page.read(offset, &mut data);
            assert_eq!(data, [0; 4], "{offset:#x}");
        }
        second.read(4, &mut data);
        assert_eq!(data, [1, 2, 3, 4]);
        second.clear();
        second.read(4, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
