//! Where things are in the guest's physical address space and on its I/O ports.
//!
//! ```text
//! 0                memory, with the boot structures below
//! 0x9fc00          end of low memory; the ACPI tables are above it
//! 1 MiB            memory, with the kernel; the initramfs is at its end
//! 3 GiB            hole for devices: virtio at 0xd0000000, interrupt controllers
//! 4 GiB            the rest of the memory
//! ```

/// The conventional memory of a PC ends here, where its BIOS would keep data.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
/// Memory beyond this is continued above [`HOLE_END`].
pub const HOLE_START: u64 = 0xc000_0000;
pub const HOLE_END: u64 = 1 << 32;

// Structures of the PVH boot protocol, which the kernel reads while it starts.
pub const START_INFO: u64 = 0x6000;
pub const MODULE_LIST: u64 = 0x6100;
pub const MEMORY_MAP: u64 = 0x7000;
pub const COMMAND_LINE: u64 = 0x2_0000;
/// With the final zero; `COMMAND_LINE_SIZE` of x86 kernels.
pub const COMMAND_LINE_MAX: usize = 2048;

/// Where a PC has its BIOS, and kernels look for the tables' root by themselves.
pub const ACPI_START: u64 = 0xe_0000;
pub const ACPI_END: u64 = HIGH_MEMORY_START;

/// Local interrupt controllers and the one of devices, as on every PC.
pub const LAPIC: u32 = 0xfee0_0000;
pub const IOAPIC: u32 = 0xfec0_0000;
/// Three pages and one page that KVM needs on Intel processors, out of everyone's way.
pub const KVM_TSS: usize = 0xfffb_d000;
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Registers of the virtio devices, a page each.
pub const VIRTIO_START: u64 = 0xd000_0000;
pub const VIRTIO_SIZE: u64 = 0x1000;
/// Slots for devices: those of the machine, then those of devices that come and go.
pub const BOOT_SLOTS: usize = 6;
pub const VIRTIO_SLOTS: usize = VIRTIO_LINES.len();
/// One interrupt line each: those of a PC that nothing else here uses. They are not
/// shared: an edge may get lost between two devices on one line.
pub const VIRTIO_LINES: [u32; 20] = [
    5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 1, 3,
];

/// Address of the registers of a virtio slot.
pub const fn virtio_address(slot: usize) -> u64 {
    VIRTIO_START + slot as u64 * VIRTIO_SIZE
}

// I/O ports.
pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_LINE: u32 = 4;
/// Command and status of the keyboard controller, which can reset the machine.
pub const KEYBOARD_PORT: u16 = 0x64;
/// Event and control registers of ACPI's power management (ACPI 6.5, 4.8.3).
pub const PM_EVENT_PORT: u16 = 0x600;
pub const PM_EVENT_LEN: u8 = 4;
pub const PM_CONTROL_PORT: u16 = 0x604;
pub const PM_CONTROL_LEN: u8 = 2;
/// The interrupt that power management would raise.
pub const SCI_LINE: u16 = 9;
/// How a guest says that its kernel has panicked (QEMU's docs/specs/pvpanic.rst).
pub const PANIC_PORT: u16 = 0x505;
