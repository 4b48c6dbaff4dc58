//! Packets of the socket device: the header, and the guest buffers around it.
//!
//! A packet is one descriptor chain: 44 bytes of header, then the payload. The
//! driver may split both over any number of descriptors (VIRTIO 1.2, 2.7.4.1;
//! Linux from 6.17 on sends large payloads as several), so a chain is first
//! flattened to a list of memory slices and then cut at byte offsets.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{Bitmap, MS};
use vm_memory::{GuestMemory, VolatileSlice};

/// Bytes of `struct virtio_vsock_hdr` (VIRTIO 1.2, 5.10.6).
pub const HEADER_LEN: usize = 44;

/// The host's well-known context id.
pub const HOST_CID: u64 = 2;

/// Stream sockets, the only kind this device offers.
pub const TYPE_STREAM: u16 = 1;

/// Most memory slices a single packet may consist of. Linux needs at most 18
/// (header plus the fragments of one sk_buff).
const MAX_SLICES: usize = 64;

/// `VIRTIO_VSOCK_OP_*`.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `VIRTIO_VSOCK_SHUTDOWN_*`: what the sender of the packet will no longer do.
pub mod shutdown {
    pub const RECEIVE: u32 = 1;
    pub const SEND: u32 = 2;
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    /// `VIRTIO_VSOCK_TYPE_*`.
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// Bytes the sender is willing to buffer on this connection.
    pub buf_alloc: u32,
    /// Bytes the sender has consumed on this connection, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
            let mut field = [0; N];
            let (head, tail) = rest.split_at(N);
            field.copy_from_slice(head);
            *rest = tail;
            field
        }
        let rest = &mut bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(rest)),
            dst_cid: u64::from_le_bytes(take(rest)),
            src_port: u32::from_le_bytes(take(rest)),
            dst_port: u32::from_le_bytes(take(rest)),
            len: u32::from_le_bytes(take(rest)),
            kind: u16::from_le_bytes(take(rest)),
            op: u16::from_le_bytes(take(rest)),
            flags: u32::from_le_bytes(take(rest)),
            buf_alloc: u32::from_le_bytes(take(rest)),
            fwd_cnt: u32::from_le_bytes(take(rest)),
        }
    }

    /// The reset that answers this packet when it belongs to no connection.
    #[must_use]
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// Why a chain is not a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("a descriptor has the wrong direction")]
    Direction,
    #[error("a descriptor lies outside guest memory")]
    Address,
    #[error("the packet has too many descriptors")]
    TooManyDescriptors,
    #[error("the buffer is shorter than its packet")]
    TooShort,
}

/// Slices of guest memory, one after the other.
///
/// The list is reused from chain to chain, so that the data path does not
/// allocate.
pub struct Slices<'a, M: GuestMemory> {
    list: Vec<VolatileSlice<'a, MS<'a, M>>>,
    iovecs: Vec<libc::iovec>,
}

impl<'a, M: GuestMemory> Slices<'a, M> {
    pub fn new() -> Self {
        Self {
            list: Vec::new(),
            iovecs: Vec::new(),
        }
    }

    pub fn clear(&mut self) {
        self.list.clear();
    }

    /// Number of slices; the end of the range of the chain that was pushed last.
    pub fn end(&self) -> usize {
        self.list.len()
    }

    /// Appends the buffers of `chain` and returns their length in bytes.
    ///
    /// `writable` is the direction all of them must have. After an error the
    /// list is as it was.
    ///
    /// # Errors
    /// The chain is not a packet.
    pub fn push_chain(
        &mut self,
        mem: &'a M,
        chain: DescriptorChain<&'a M>,
        writable: bool,
    ) -> Result<usize, Malformed> {
        let before = self.list.len();
        let pushed = self.push_descriptors(mem, chain, writable);
        if pushed.is_err() {
            self.list.truncate(before);
        }
        pushed
    }

    fn push_descriptors(
        &mut self,
        mem: &'a M,
        chain: DescriptorChain<&'a M>,
        writable: bool,
    ) -> Result<usize, Malformed> {
        let limit = self.list.len() + MAX_SLICES;
        let mut total = 0;
        for (count, descriptor) in chain.enumerate() {
            // Empty descriptors make no slices, but they take time.
            if count == MAX_SLICES {
                return Err(Malformed::TooManyDescriptors);
            }
            if descriptor.is_write_only() != writable {
                return Err(Malformed::Direction);
            }
            for slice in mem.get_slices(descriptor.addr(), descriptor.len() as usize) {
                if self.list.len() == limit {
                    return Err(Malformed::TooManyDescriptors);
                }
                let slice = slice.map_err(|_| Malformed::Address)?;
                total += slice.len();
                self.list.push(slice);
            }
        }
        if total < HEADER_LEN {
            return Err(Malformed::TooShort);
        }
        Ok(total)
    }

    /// Reads the header at the start of the slices `range`.
    ///
    /// # Errors
    /// The slices are shorter than a header.
    pub fn read_header(&self, range: Range<usize>) -> Result<Header, Malformed> {
        let mut bytes = [0; HEADER_LEN];
        let mut at = 0;
        for slice in &self.list[range] {
            at += slice.copy_to(&mut bytes[at..]);
        }
        if at < HEADER_LEN {
            return Err(Malformed::TooShort);
        }
        Ok(Header::from_bytes(&bytes))
    }

    /// Writes `header` to the start of the slices `range`, which must be long
    /// enough (as [`Slices::push_chain`] ensures).
    pub fn write_header(&self, range: Range<usize>, header: &Header) {
        let bytes = header.to_bytes();
        let mut rest = bytes.as_slice();
        for slice in &self.list[range] {
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
        }
    }

    /// Copies `to.len()` bytes, starting `skip` bytes into the slices `range`.
    pub fn copy_out(&self, range: Range<usize>, mut skip: usize, to: &mut [u8]) {
        let mut at = 0;
        for slice in &self.list[range] {
            let Ok(rest) = slice.offset(skip.min(slice.len())) else {
                return;
            };
            skip -= skip.min(slice.len());
            at += rest.copy_to(&mut to[at..]);
        }
    }

    /// Forgets what earlier calls of [`Slices::add_iovecs`] collected.
    pub fn clear_iovecs(&mut self) {
        self.iovecs.clear();
    }

    /// Adds `len` bytes, starting `skip` bytes into the slices `range`, to the
    /// next transfer.
    pub fn add_iovecs(&mut self, range: Range<usize>, mut skip: usize, mut len: usize) {
        for slice in &self.list[range] {
            let start = skip.min(slice.len());
            let count = len.min(slice.len() - start);
            skip -= start;
            len -= count;
            if count == 0 {
                continue;
            }
            let base = slice.ptr_guard_mut().as_ptr();
            self.iovecs.push(libc::iovec {
                // SAFETY: start <= slice.len(), so the pointer stays in the slice.
                iov_base: unsafe { base.add(start) }.cast(),
                iov_len: count,
            });
        }
    }

    /// Sends the collected bytes and returns how many were taken.
    ///
    /// # Errors
    /// Those of sendmsg(2); `WouldBlock` when the socket is full.
    pub fn send_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let message = self.message();
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the slices are mapped guest memory that outlives 'a; the kernel
        // copes with the guest changing them meanwhile.
        retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) })
    }

    /// Receives into the collected bytes and returns how many were filled; 0 at
    /// the end of the stream.
    ///
    /// # Errors
    /// Those of recvmsg(2); `WouldBlock` when there is nothing to read.
    pub fn receive_from(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = self.message();
        // SAFETY: the slices are mapped guest memory that outlives 'a and that
        // nothing in this process holds a reference to.
        retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: all-zero bytes are a valid msghdr: no name, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.iovecs.as_mut_ptr();
        message.msg_iovlen = self.iovecs.len().min(libc::UIO_MAXIOV as usize);
        message
    }

    /// Records that the device has written `len` bytes, starting `skip` bytes
    /// into the slices `range`, behind the back of the memory's accessors.
    pub fn mark_dirty(&self, range: Range<usize>, mut skip: usize, mut len: usize) {
        for slice in &self.list[range] {
            let start = skip.min(slice.len());
            let count = len.min(slice.len() - start);
            skip -= start;
            len -= count;
            slice.bitmap().mark_dirty(start, count);
        }
    }
}

/// Repeats a transfer that a signal interrupted.
fn retry(mut transfer: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(transfer()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
