//! The file system device for [`crate::fuzzing`]: our part of it and the server's way
//! from bytes to calls, with files that do not exist behind it.
//!
//! The server's own files are left out, because a fuzz target must not be able to touch
//! those of the host.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use virtiofsd::filesystem::{
    Context, DirEntry, DirectoryIterator, Entry, Extensions, FileSystem, FsOptions, GetxattrReply,
    ListxattrReply, OpenOptions, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;

use super::device::Device;
use super::guard::Guard;
use super::vhost_user::Backend;
use crate::fuzzing::Input;
use crate::vm::devices::vhost_user::{Status, lock};

/// Numbers of files: directories are odd.
const FILES: u64 = 16;
const MAX_HANDLES: usize = 64;
const DESCRIPTORS: u64 = 40;

/// A device of such files, and where its failure would be seen.
pub fn backend() -> (Arc<Backend<Shelf>>, Arc<Status>) {
    let status = Status::new().expect("a descriptor");
    let device = Device::new(Guard::new(Shelf::new(), DESCRIPTORS));
    let backend = Backend::new(device, status.clone()).expect("a descriptor");
    (backend, status)
}

/// Headers of requests that the server may understand, in buffers of their length.
pub fn content(input: &mut Input<'_>, len: usize) -> Vec<u8> {
    if len != 40 {
        let how = input.byte();
        let mut bytes = input.bytes(len).to_vec();
        // A name ends with a zero, more often than not.
        if how & 1 == 0
            && let Some(last) = bytes.last_mut()
        {
            *last = 0;
        }
        return bytes;
    }
    let (opcode, file, how) = (input.byte() % 54, input.byte(), input.byte());
    let mut bytes = vec![0; 40];
    let len = if how & 1 == 0 { 4096 } else { input.u32() };
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes[4] = opcode;
    bytes[8] = how;
    bytes[16] = file % FILES as u8;
    bytes[36] = how >> 6;
    bytes
}

/// Files of which none is real. What is asked of them was checked before.
pub struct Shelf {
    /// What is in all of them.
    content: File,
    /// The files that are open, by number.
    handles: Mutex<BTreeMap<u64, u64>>,
}

type Handle = (Option<u64>, OpenOptions);

impl Shelf {
    fn new() -> Shelf {
        let content = File::from(memfd_create("file", MemfdFlags::CLOEXEC).expect("a file"));
        content.set_len(8192).expect("memory");
        Shelf {
            content,
            handles: Mutex::default(),
        }
    }

    fn attr(file: u64) -> fuse::Attr {
        let kind = match file % 4 {
            1 | 3 => libc::S_IFDIR,
            2 => libc::S_IFLNK,
            _ => libc::S_IFREG,
        };
        fuse::Attr {
            ino: file,
            size: 8192,
            mode: kind | 0o755,
            ctime: file * 1000,
            flags: if file == 7 { fuse::ATTR_SUBMOUNT } else { 0 },
            ..Default::default()
        }
    }

    fn known(file: u64) -> io::Result<u64> {
        match (1..=FILES).contains(&file) {
            true => Ok(file),
            false => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    /// A name in a directory is never a way out of it.
    fn entry(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = name.to_bytes();
        assert!(!matches!(name, b"" | b"." | b".."), "{name:?}");
        assert!(!name.contains(&b'/'), "{name:?}");
        Self::known(parent)?;
        let file = name.iter().map(|byte| u64::from(*byte)).sum::<u64>() % FILES + 1;
        Ok(Entry {
            inode: file,
            generation: 0,
            attr: Self::attr(file),
            attr_timeout: Duration::MAX,
            entry_timeout: Duration::MAX,
        })
    }

    fn open_file(&self, file: u64) -> io::Result<Handle> {
        let file = Self::known(file)?;
        let mut handles = lock(&self.handles);
        if handles.len() >= MAX_HANDLES {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let number = handles.last_key_value().map_or(1, |(last, _)| last + 1);
        handles.insert(number, file);
        Ok((Some(number), OpenOptions::empty()))
    }

    fn close(&self, file: u64, handle: u64) -> io::Result<()> {
        let mut handles = lock(&self.handles);
        if handles.get(&handle) != Some(&file) {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        handles.remove(&handle);
        Ok(())
    }

    fn has(&self, handle: u64) -> io::Result<()> {
        match lock(&self.handles).contains_key(&handle) {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }
}

/// Some names.
pub struct Names(u64);

impl DirectoryIterator for Names {
    fn next(&mut self) -> Option<DirEntry<'_>> {
        let names = [c".", c"..", c"a", c"a longer name", c"z"];
        let name = names.get(usize::try_from(self.0).ok()?)?;
        self.0 += 1;
        Some(DirEntry {
            ino: self.0,
            offset: self.0,
            type_: u32::from(libc::DT_REG),
            name,
        })
    }
}

impl FileSystem for Shelf {
    type Inode = u64;
    type Handle = u64;
    type DirIter = Names;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        lock(&self.handles).clear();
        Ok(capable)
    }

    fn destroy(&self) {
        lock(&self.handles).clear();
    }

    fn lookup(&self, _: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.entry(parent, name)
    }

    fn getattr(&self, _: Context, file: u64, _: Option<u64>) -> io::Result<(fuse::Attr, Duration)> {
        Ok((Self::attr(Self::known(file)?), Duration::MAX))
    }

    fn setattr(
        &self,
        _: Context,
        file: u64,
        _: fuse::SetattrIn,
        _: Option<u64>,
        _: SetattrValid,
    ) -> io::Result<(fuse::Attr, Duration)> {
        Ok((Self::attr(Self::known(file)?), Duration::MAX))
    }

    fn readlink(&self, _: Context, file: u64) -> io::Result<Vec<u8>> {
        Self::known(file)?;
        Ok(b"../../target".to_vec())
    }

    fn symlink(
        &self,
        _: Context,
        _: &CStr,
        parent: u64,
        name: &CStr,
        _: Extensions,
    ) -> io::Result<Entry> {
        self.entry(parent, name)
    }

    fn mknod(
        &self,
        _: Context,
        parent: u64,
        name: &CStr,
        _: u32,
        _: u32,
        _: u32,
        _: Extensions,
    ) -> io::Result<Entry> {
        self.entry(parent, name)
    }

    fn mkdir(
        &self,
        _: Context,
        parent: u64,
        name: &CStr,
        _: u32,
        _: u32,
        _: Extensions,
    ) -> io::Result<Entry> {
        self.entry(parent, name)
    }

    fn unlink(&self, _: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.entry(parent, name).map(drop)
    }

    fn rmdir(&self, _: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.entry(parent, name).map(drop)
    }

    fn rename(
        &self,
        _: Context,
        from: u64,
        old: &CStr,
        to: u64,
        new: &CStr,
        _: u32,
    ) -> io::Result<()> {
        self.entry(from, old)
            .and_then(|_| self.entry(to, new))
            .map(drop)
    }

    fn link(&self, _: Context, file: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        Self::known(file)?;
        self.entry(parent, name)
    }

    fn open(&self, _: Context, file: u64, _: bool, _: u32) -> io::Result<Handle> {
        self.open_file(file)
    }

    fn create(
        &self,
        _: Context,
        parent: u64,
        name: &CStr,
        _: u32,
        _: bool,
        _: u32,
        _: u32,
        _: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let entry = self.entry(parent, name)?;
        let (handle, options) = self.open_file(entry.inode)?;
        Ok((entry, handle, options))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        _: Context,
        _: u64,
        handle: u64,
        mut to: W,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        self.has(handle)?;
        to.read_from_file_at(&self.content, size as usize, offset, None)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        _: Context,
        _: u64,
        handle: u64,
        mut from: R,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: bool,
        _: bool,
        _: u32,
    ) -> io::Result<usize> {
        self.has(handle)?;
        // Within the file, that it stays small.
        from.write_to_file_at(&self.content, size.min(4096) as usize, offset % 4096, None)
    }

    fn release(
        &self,
        _: Context,
        file: u64,
        _: u32,
        handle: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        self.close(file, handle)
    }

    fn getxattr(&self, _: Context, _: u64, _: &CStr, size: u32) -> io::Result<GetxattrReply> {
        match size {
            0 => Ok(GetxattrReply::Count(5)),
            5.. => Ok(GetxattrReply::Value(b"value".to_vec())),
            _ => Err(io::Error::from_raw_os_error(libc::ERANGE)),
        }
    }

    fn listxattr(&self, _: Context, _: u64, size: u32) -> io::Result<ListxattrReply> {
        match size {
            0 => Ok(ListxattrReply::Count(7)),
            7.. => Ok(ListxattrReply::Names(b"user.x\0".to_vec())),
            _ => Err(io::Error::from_raw_os_error(libc::ERANGE)),
        }
    }

    fn opendir(&self, _: Context, file: u64, _: u32) -> io::Result<Handle> {
        self.open_file(file)
    }

    fn readdir(&self, _: Context, _: u64, handle: u64, _: u32, offset: u64) -> io::Result<Names> {
        self.has(handle)?;
        Ok(Names(offset))
    }

    fn releasedir(&self, _: Context, file: u64, _: u32, handle: u64) -> io::Result<()> {
        self.close(file, handle)
    }

    fn statfs(&self, _: Context, _: u64) -> io::Result<libc::statvfs64> {
        // SAFETY: zeros are a valid value of the structure.
        Ok(unsafe { std::mem::zeroed() })
    }
}
