//! The buffers of a request: what its chain of descriptors says, checked once.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, VolatileSlice};

/// Most buffers of one direction in a request (`IOV_MAX` of Linux).
const MAX_BUFFERS: usize = 1024;

/// Pieces of the guest's memory, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

/// What the device reads, and what it writes. `None` for a chain with something that
/// is not memory, or with more than anybody needs.
pub fn of_chain<'m>(
    memory: &'m GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> Option<(Buffers<'m>, Buffers<'m>)> {
    let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
    for descriptor in chain {
        let buffers = match descriptor.is_write_only() {
            true => &mut writable,
            false => &mut readable,
        };
        let len = descriptor.len() as usize;
        if len == 0 {
            continue;
        }
        if buffers.slices.len() >= MAX_BUFFERS {
            return None;
        }
        let slice = memory.get_slice(descriptor.addr(), len).ok()?;
        buffers.len = buffers.len.checked_add(len)?;
        buffers.slices.push(slice);
    }
    Some((readable, writable))
}

impl<'m> Buffers<'m> {
    pub fn len(&self) -> usize {
        self.len
    }

    /// Cuts off everything from `at` on, and returns it. `None` when there is less.
    pub fn split_off(&mut self, at: usize) -> Option<Buffers<'m>> {
        if at > self.len {
            return None;
        }
        let (mut front, mut back) = (Vec::new(), Vec::new());
        let mut left = at;
        for slice in self.slices.drain(..) {
            let len = slice.len().min(left);
            if len > 0 {
                front.push(slice.subslice(0, len).ok()?);
            }
            if len < slice.len() {
                back.push(slice.subslice(len, slice.len() - len).ok()?);
            }
            left -= len;
        }
        let back = Buffers {
            slices: back,
            len: self.len - at,
        };
        (self.slices, self.len) = (front, at);
        Some(back)
    }

    /// Takes the first `N` bytes off. `None` when there are fewer.
    pub fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let rest = self.split_off(N)?;
        let mut bytes = [0; N];
        self.read(&mut bytes);
        *self = rest;
        Some(bytes)
    }

    /// Copies as much as there is to `bytes`; how much that was.
    pub fn read(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let len = slice.len().min(bytes.len() - done);
            slice.copy_to(&mut bytes[done..done + len]);
            done += len;
        }
        done
    }

    /// Copies as much of `bytes` as there is room for; how much that was.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let len = slice.len().min(bytes.len() - done);
            slice.copy_from(&bytes[done..done + len]);
            done += len;
        }
        done
    }

    /// Overwrites a few bytes in the middle.
    pub fn write_at(&self, mut at: usize, bytes: &[u8]) {
        let mut left = bytes;
        for slice in &self.slices {
            if at >= slice.len() {
                at -= slice.len();
                continue;
            }
            let len = left.len().min(slice.len() - at);
            // Inside of the slice.
            let _ = slice.write_slice(&left[..len], at);
            (left, at) = (&left[len..], 0);
        }
    }

    /// For readv(2) and its like. They are valid as long as the memory is mapped.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        let iovec = |slice: &VolatileSlice<'_>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        self.slices.iter().map(iovec).collect()
    }

    /// Whether each piece begins and ends at a multiple of `size`.
    pub fn are_aligned(&self, size: usize) -> bool {
        self.slices.iter().all(|slice| {
            let start = slice.ptr_guard().as_ptr() as usize;
            start.is_multiple_of(size) && slice.len().is_multiple_of(size)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    fn buffers<'m>(memory: &'m GuestMemoryMmap, pieces: &[(u64, usize)]) -> Buffers<'m> {
        let slices: Vec<_> = pieces
            .iter()
            .map(|(address, len)| memory.get_slice(GuestAddress(*address), *len).unwrap())
            .collect();
        let len = pieces.iter().map(|piece| piece.1).sum();
        Buffers { slices, len }
    }

    #[test]
    fn pieces_are_one_sequence_of_bytes() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut all = buffers(&memory, &[(0x1000, 3), (0x3000, 1), (0x5000, 6)]);
        assert_eq!(all.write(b"0123456789abc"), 10);
        all.write_at(2, b"xyz");
        let mut bytes = [0; 16];
        assert_eq!(all.read(&mut bytes), 10);
        assert_eq!(&bytes[..10], b"01xyz56789");
        assert_eq!(all.take::<4>(), Some(*b"01xy"));
        let end = all.split_off(5).unwrap();
        assert_eq!((all.len(), end.len()), (5, 1));
        assert_eq!(all.read(&mut bytes), 5);
        assert_eq!(&bytes[..5], b"z5678");
        assert_eq!(end.iovecs().len(), 1);
        assert!(all.take::<6>().is_none());
        assert!(all.split_off(6).is_none());
        assert_eq!(all.split_off(5).unwrap().len(), 0);
    }

    #[test]
    fn alignment_is_that_of_every_piece() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        assert!(buffers(&memory, &[(0x1000, 512), (0x3200, 1024)]).are_aligned(512));
        assert!(!buffers(&memory, &[(0x1000, 512), (0x3200, 1024)]).are_aligned(4096));
        assert!(!buffers(&memory, &[(0x1000, 100)]).are_aligned(512));
        assert!(!buffers(&memory, &[(0x1001, 512)]).are_aligned(512));
    }
}
