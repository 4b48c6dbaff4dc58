//! What is behind a virtual disk: a file or a block device, which may want its I/O
//! aligned.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::FallocateFlags;

use super::super::buffers::Buffers;
use crate::vm::BlockDevice;

pub const SECTOR: u64 = 512;
/// Longest piece that goes through memory of the host's.
const BOUNCE: usize = 256 * 1024;
/// What is enough for any disk.
const BOUNCE_ALIGNMENT: usize = 4096;

pub struct Disk {
    file: File,
    /// Bytes, a multiple of sectors.
    pub size: u64,
    /// What addresses and lengths have to be multiples of.
    alignment: usize,
    pub block_size: u32,
    pub read_only: bool,
}

/// Direction of a transfer, from the disk's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    Read,
    Write,
}

impl Disk {
    /// Takes a copy of the descriptor. A device is used past the host's cache: it is
    /// read by others as well, and the guest has a cache of its own.
    ///
    /// # Errors
    /// The kernel's, about the file.
    pub fn new(device: &BlockDevice) -> io::Result<Disk> {
        let file = File::from(device.file.try_clone()?);
        let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
        let mut disk = Disk {
            file,
            size: size - size % SECTOR,
            alignment: 1,
            block_size: 512,
            read_only: device.read_only,
        };
        if device.is_device {
            disk.block_size = logical_block_size(&disk.file)?;
            disk.alignment = disk.block_size as usize;
            let flags = rustix::fs::fcntl_getfl(&disk.file)?;
            rustix::fs::fcntl_setfl(&disk.file, flags | rustix::fs::OFlags::DIRECT)?;
        }
        Ok(disk)
    }

    /// As if the file were a device with blocks of this size.
    #[cfg(any(test, fuzzing))]
    pub fn demand_alignment(&mut self, alignment: usize) {
        self.alignment = alignment;
    }

    /// Moves all of `buffers` from or to `offset`.
    ///
    /// # Errors
    /// As preadv(2) and pwritev(2).
    pub fn transfer(
        &self,
        direction: Transfer,
        buffers: Buffers<'_>,
        offset: u64,
    ) -> io::Result<()> {
        if buffers.are_aligned(self.alignment) {
            let mut buffers = buffers;
            let mut offset = offset;
            while buffers.len() > 0 {
                let done = self.vectored(direction, &buffers.iovecs(), offset)?;
                offset += done as u64;
                buffers = buffers.split_off(done).ok_or(io::ErrorKind::Other)?;
            }
            return Ok(());
        }
        self.bounce(direction, buffers, offset)
    }

    /// For memory that the disk cannot get at by itself.
    fn bounce(
        &self,
        direction: Transfer,
        mut buffers: Buffers<'_>,
        mut offset: u64,
    ) -> io::Result<()> {
        let mut memory = vec![0u8; BOUNCE + BOUNCE_ALIGNMENT];
        let skip = memory.as_ptr().align_offset(BOUNCE_ALIGNMENT);
        while buffers.len() > 0 {
            let len = buffers.len().min(BOUNCE);
            let rest = buffers.split_off(len).ok_or(io::ErrorKind::Other)?;
            let piece = &mut memory[skip..skip + len];
            match direction {
                Transfer::Read => {
                    self.all(direction, piece, offset)?;
                    buffers.write(piece);
                }
                Transfer::Write => {
                    buffers.read(piece);
                    self.all(direction, piece, offset)?;
                }
            }
            offset += len as u64;
            buffers = rest;
        }
        Ok(())
    }

    fn all(&self, direction: Transfer, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let iovec = libc::iovec {
                iov_base: bytes[done..].as_mut_ptr().cast(),
                iov_len: bytes.len() - done,
            };
            done += self.vectored(direction, &[iovec], offset + done as u64)?;
        }
        Ok(())
    }

    /// One call; what it did is more than nothing.
    fn vectored(
        &self,
        direction: Transfer,
        iovecs: &[libc::iovec],
        offset: u64,
    ) -> io::Result<usize> {
        // Within the size of a file.
        let (fd, offset) = (self.file.as_raw_fd(), offset as libc::off_t);
        // At most 1024, see `Buffers`.
        let count = iovecs.len() as libc::c_int;
        loop {
            // SAFETY: the vectors are memory of the guest, which stays mapped, or of
            // this process, which the caller has exclusively.
            let done = unsafe {
                match direction {
                    Transfer::Read => libc::preadv(fd, iovecs.as_ptr(), count, offset),
                    Transfer::Write => libc::pwritev(fd, iovecs.as_ptr(), count, offset),
                }
            };
            match usize::try_from(done) {
                // The file has become shorter.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(done) => return Ok(done),
                Err(_) => {
                    let e = io::Error::last_os_error();
                    if e.kind() != io::ErrorKind::Interrupted {
                        return Err(e);
                    }
                }
            }
        }
    }

    /// Returns when everything written before is safe.
    ///
    /// # Errors
    /// As fdatasync(2).
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// The guest does not need the content any more.
    ///
    /// # Errors
    /// As fallocate(2), unless it is not supported: then nothing happens, which is
    /// what a hint may lead to.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.punch(offset, len) {
            Err(e) if is_unsupported(&e) => Ok(()),
            other => other,
        }
    }

    /// Reads as zeros from now on; the space may be given back when `unmap`.
    ///
    /// # Errors
    /// As fallocate(2) and pwritev(2).
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let zeroed = match unmap {
            true => self.punch(offset, len),
            false => self.allocate(FallocateFlags::ZERO_RANGE, offset, len),
        };
        match zeroed {
            Err(e) if is_unsupported(&e) => self.write_all_zeroes(offset, len),
            other => other,
        }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, len)
    }

    fn allocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        rustix::fs::fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len)?;
        Ok(())
    }

    fn write_all_zeroes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let mut memory = vec![0u8; BOUNCE + BOUNCE_ALIGNMENT];
        let skip = memory.as_ptr().align_offset(BOUNCE_ALIGNMENT);
        while len > 0 {
            let piece = len.min(BOUNCE as u64);
            // At most BOUNCE.
            let bytes = &mut memory[skip..skip + piece as usize];
            self.all(Transfer::Write, bytes, offset)?;
            offset += piece;
            len -= piece;
        }
        Ok(())
    }
}

fn is_unsupported(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}

/// `BLKSSZGET` of linux/fs.h.
fn logical_block_size(file: &File) -> io::Result<u32> {
    const BLKSSZGET: libc::Ioctl = 0x1268;
    let mut size: libc::c_int = 0;
    // SAFETY: the request writes an int, and the descriptor is open.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(size)
        .ok()
        .filter(|size| size.is_power_of_two() && (512..=65536).contains(size))
        .ok_or_else(|| io::Error::other(format!("blocks of {size} bytes")))
}
