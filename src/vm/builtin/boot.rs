//! Putting the kernel and what it needs to start into the guest's memory.
//!
//! The PVH boot protocol (Xen's docs/misc/pvh.pandoc): an uncompressed ELF kernel
//! is entered in 32-bit mode without paging, with the address of a structure that
//! names the command line, the initramfs, the memory map and the ACPI tables.

use std::fs::File;

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{self, KernelLoader};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::acpi;
use super::layout::{
    ACPI_START, COMMAND_LINE, COMMAND_LINE_MAX, HIGH_MEMORY_START, HOLE_START, LOW_MEMORY_END,
    MEMORY_MAP, MODULE_LIST, START_INFO,
};
use super::memory::ranges;

/// Version 1 of the structure, the first with a memory map.
const START_MAGIC: u32 = 0x336e_c578;
const START_VERSION: u32 = 1;
/// Memory in the memory map, as in BIOS tables.
const RAM: u32 = 1;
const PAGE: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the kernel cannot be loaded: {0}")]
    Kernel(#[from] loader::Error),
    #[error(
        "the kernel has no PVH entry; it has to be an uncompressed ELF with CONFIG_PVH, other kernels need hypervisor = \"qemu\""
    )]
    NoEntry,
    #[error("the kernel's command line is longer than {COMMAND_LINE_MAX} bytes")]
    CommandLine,
    #[error("kernel and image need more than the {0} MiB of memory")]
    TooSmall(u64),
    #[error("the guest's memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("reading the image: {0}")]
    Image(#[source] std::io::Error),
    #[error("there are too many processors for the tables")]
    Tables,
}

/// Loads everything for a machine of `size` bytes and returns the address where
/// its first processor starts.
///
/// # Errors
/// See [`Error`].
pub fn load(
    memory: &GuestMemoryMmap,
    size: u64,
    vcpus: u8,
    kernel: &mut File,
    image: &mut File,
    parameters: &str,
) -> Result<u64, Error> {
    let low = size.min(HOLE_START);
    let loaded = Elf::load(memory, None, kernel, Some(GuestAddress(HIGH_MEMORY_START)))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(Error::NoEntry);
    };
    let image_len = image.metadata().map_err(Error::Image)?.len();
    let image_start = low
        .checked_sub(image_len)
        .map(|start| start / PAGE * PAGE)
        .filter(|start| *start >= loaded.kernel_end)
        .ok_or(Error::TooSmall(size >> 20))?;
    // As long as memory, which fits.
    memory.read_exact_volatile_from(GuestAddress(image_start), image, image_len as usize)?;

    let mut line = parameters.as_bytes().to_vec();
    line.push(0);
    if line.len() > COMMAND_LINE_MAX {
        return Err(Error::CommandLine);
    }
    memory.write_slice(&line, GuestAddress(COMMAND_LINE))?;
    let tables = acpi::tables(vcpus).ok_or(Error::Tables)?;
    memory.write_slice(&tables, GuestAddress(ACPI_START))?;
    write_start_info(memory, size, image_start, image_len)?;
    Ok(entry.raw_value())
}

fn write_start_info(
    memory: &GuestMemoryMmap,
    size: u64,
    image_start: u64,
    image_len: u64,
) -> Result<(), Error> {
    let map = memory_map(size);
    for (index, entry) in map.iter().enumerate() {
        let bytes = [
            &entry.addr.to_le_bytes()[..],
            &entry.size.to_le_bytes(),
            &entry.type_.to_le_bytes(),
            &entry.reserved.to_le_bytes(),
        ]
        .concat();
        let address = MEMORY_MAP + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        memory.write_slice(&bytes, GuestAddress(address))?;
    }
    let module = hvm_modlist_entry {
        paddr: image_start,
        size: image_len,
        ..hvm_modlist_entry::default()
    };
    let words = [
        module.paddr,
        module.size,
        module.cmdline_paddr,
        module.reserved,
    ];
    memory.write_slice(
        &words.map(u64::to_le_bytes).concat(),
        GuestAddress(MODULE_LIST),
    )?;
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: 1,
        modlist_paddr: MODULE_LIST,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: ACPI_START,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let head = [info.magic, info.version, info.flags, info.nr_modules];
    let addresses = [
        info.modlist_paddr,
        info.cmdline_paddr,
        info.rsdp_paddr,
        info.memmap_paddr,
    ];
    let tail = [info.memmap_entries, info.reserved];
    let bytes = [
        head.map(u32::to_le_bytes).concat(),
        addresses.map(u64::to_le_bytes).concat(),
        tail.map(u32::to_le_bytes).concat(),
    ]
    .concat();
    memory.write_slice(&bytes, GuestAddress(START_INFO))?;
    Ok(())
}

/// The memory the kernel may use.
fn memory_map(size: u64) -> Vec<hvm_memmap_table_entry> {
    let ram = |addr, end| hvm_memmap_table_entry {
        addr,
        size: end - addr,
        type_: RAM,
        reserved: 0,
    };
    let mut map = vec![ram(0, LOW_MEMORY_END)];
    for range in ranges(size) {
        let start = range.address.max(HIGH_MEMORY_START);
        map.push(ram(start, range.address + range.len));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::super::memory::MemoryFile;
    use super::*;
    use std::io::Write;

    const MIB: u64 = 1 << 20;

    /// An ELF with one segment at 16 MiB and, if asked for, a PVH note.
    fn kernel(with_note: bool) -> File {
        let mut elf = vec![0u8; 0x1000];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16..20].copy_from_slice(&[2, 0, 62, 0]);
        elf[24..32].copy_from_slice(&(16 * MIB).to_le_bytes());
        elf[32..40].copy_from_slice(&64u64.to_le_bytes());
        elf[54..58].copy_from_slice(&[56, 0, 2, 0]);
        let mut segment = |at: usize, kind: u32, words: [u64; 6]| {
            elf[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            for (index, word) in words.iter().enumerate() {
                elf[at + 8 + index * 8..][..8].copy_from_slice(&word.to_le_bytes());
            }
        };
        // Offset, virtual and physical address, size in file and memory, alignment.
        segment(64, 1, [0x800, 0, 16 * MIB, 16, MIB, 4096]);
        segment(120, 4, [0x400, 0, 0, 20, 20, 4]);
        let kind: u32 = if with_note { 18 } else { 1 };
        let note = [4u32, 4, kind, u32::from_le_bytes(*b"Xen\0"), 0x0123_4560];
        elf[0x400..0x414].copy_from_slice(&note.map(u32::to_le_bytes).concat());
        elf[0x800..0x810].copy_from_slice(b"this is a kernel");
        file(&elf)
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        file
    }

    fn read(memory: &GuestMemoryMmap, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn u64_at(memory: &GuestMemoryMmap, address: u64) -> u64 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn the_kernel_finds_its_start_info() {
        let size = 64 * MIB;
        let memory = MemoryFile::new(size, 0).unwrap().map().unwrap();
        let mut image = file(&[b'i'; 5000]);
        let entry = load(&memory, size, 2, &mut kernel(true), &mut image, "quiet").unwrap();
        assert_eq!(entry, 0x0123_4560);
        assert_eq!(read(&memory, 16 * MIB, 16), b"this is a kernel");
        let magic: u32 = memory.read_obj(GuestAddress(START_INFO)).unwrap();
        assert_eq!(magic, START_MAGIC);
        let module = u64_at(&memory, START_INFO + 16);
        let (start, len) = (u64_at(&memory, module), u64_at(&memory, module + 8));
        assert_eq!((start % PAGE, len), (0, 5000));
        assert_eq!(read(&memory, start, 5000), [b'i'; 5000]);
        assert_eq!(
            read(&memory, u64_at(&memory, START_INFO + 24), 6),
            b"quiet\0"
        );
        assert_eq!(
            read(&memory, u64_at(&memory, START_INFO + 32), 8),
            b"RSD PTR "
        );
        let map = u64_at(&memory, START_INFO + 40);
        assert_eq!(u64_at(&memory, map + 8), LOW_MEMORY_END);
        assert_eq!(u64_at(&memory, map + 24), HIGH_MEMORY_START);
    }

    #[test]
    fn what_cannot_be_booted_is_said() {
        let size = 64 * MIB;
        let memory = MemoryFile::new(size, 0).unwrap().map().unwrap();
        let try_load = |kernel: &mut File, image: &[u8], parameters: &str| {
            load(&memory, size, 1, kernel, &mut file(image), parameters).unwrap_err()
        };
        let e = try_load(&mut kernel(false), b"", "");
        assert!(matches!(e, Error::NoEntry), "{e}");
        let e = try_load(&mut file(b"MZ and so on"), b"", "");
        assert!(matches!(e, Error::Kernel(_)), "{e}");
        let e = try_load(&mut kernel(true), &vec![0; 48 << 20], "");
        assert!(matches!(e, Error::TooSmall(64)), "{e}");
        let e = try_load(&mut kernel(true), b"", &"x".repeat(COMMAND_LINE_MAX));
        assert!(matches!(e, Error::CommandLine), "{e}");
    }

    #[test]
    fn memory_above_the_hole_is_in_the_map() {
        let map = memory_map(6 << 30);
        let last = map.last().unwrap();
        assert_eq!((last.addr, last.size), (4 << 30, 3 << 30));
        assert_eq!(map.len(), 3);
    }
}
