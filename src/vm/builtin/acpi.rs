//! ACPI tables: processors, interrupts, virtio devices, and how to power off.
//!
//! What a PC without firmware needs to be found without guessing. There is no
//! code in them but names and resources.

use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::FADTBuilder;
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, facs::FACS};

use super::layout::{
    ACPI_END, ACPI_START, IOAPIC, LAPIC, PANIC_PORT, PM_CONTROL_LEN, PM_CONTROL_PORT, PM_EVENT_LEN,
    PM_EVENT_PORT, SCI_LINE, VIRTIO_LINES, VIRTIO_SIZE, virtio_address,
};

/// By which Linux finds virtio devices over MMIO.
pub const VIRTIO_ID: &str = "LNRO0005";

const OEM: [u8; 6] = *b"KUASAR";
const OEM_TABLE: [u8; 8] = *b"RUNV    ";
const REVISION: u32 = 1;

/// Value of SLP_TYP for the state "soft off" (ACPI 6.5, 7.4.2).
pub const SOFT_OFF: u8 = 5;

/// FADT, IA-PC boot architecture flags: no VGA, no ASPM, no CMOS clock; neither
/// legacy devices nor a keyboard controller (ACPI 6.5, 5.2.9.3).
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 4 | 1 << 5;
/// FADT, fixed feature flags: WBINVD works, no power and sleep button.
const FEATURES: u32 = 1 << 0 | 1 << 4 | 1 << 5;

/// The tables in one piece for [`ACPI_START`], the root (RSDP) first.
///
/// `None` when they do not fit, which takes far more processors than KVM has.
pub fn tables(vcpus: u8) -> Option<Vec<u8>> {
    let mut tables = Tables {
        // The root is written last.
        bytes: vec![0; Rsdp::len()],
    };
    let facs = tables.add(&FACS::new());
    let dsdt = tables.add(&dsdt());
    let fadt = tables.add(&fadt(u32::try_from(dsdt).ok()?, u32::try_from(facs).ok()?));
    let madt = tables.add(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.add(&xsdt);
    let root = bytes(&Rsdp::new(OEM, xsdt));
    tables.bytes[..root.len()].copy_from_slice(&root);
    let fits = tables.bytes.len() as u64 <= ACPI_END - ACPI_START;
    fits.then_some(tables.bytes)
}

struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        // The strictest alignment is that of the FACS.
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = ACPI_START + self.bytes.len() as u64;
        self.bytes.extend(bytes(table));
        address
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u32, facs: u32) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_32(dsdt)
        .firmware_ctrl_32(facs);
    fadt.sci_int = SCI_LINE.into();
    fadt.pm1a_evt_blk = u32::from(PM_EVENT_PORT).into();
    fadt.pm1_evt_len = PM_EVENT_LEN;
    fadt.pm1a_cnt_blk = u32::from(PM_CONTROL_PORT).into();
    fadt.pm1_cnt_len = PM_CONTROL_LEN;
    // Not there: C2 and C3.
    fadt.p_lvl2_lat = 0xffff.into();
    fadt.p_lvl3_lat = 0xffff.into();
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.flags = FEATURES.into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM,
        OEM_TABLE,
        REVISION,
        LocalInterruptController::Address(LAPIC),
    );
    for cpu in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    madt
}

fn dsdt() -> Sdt {
    let mut code = Vec::new();
    for (slot, &line) in VIRTIO_LINES.iter().enumerate() {
        virtio(slot, line, &mut code);
    }
    aml::Scope::new(
        Path::new("\\_SB_"),
        vec![&aml::Device::new(
            Path::new("PANC"),
            vec![
                &aml::Name::new(Path::new("_HID"), &"QEMU0001"),
                &aml::Name::new(
                    Path::new("_CRS"),
                    &aml::ResourceTemplate::new(vec![&aml::IO::new(PANIC_PORT, PANIC_PORT, 1, 1)]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut code);
    let off = SOFT_OFF;
    aml::Name::new(
        Path::new("\\_S5_"),
        &aml::Package::new(vec![&off, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&code);
    dsdt
}

/// A slot for a virtio device. Whether there is one is in its registers.
fn virtio(slot: usize, line: u32, code: &mut Vec<u8>) {
    // Below 4 GiB and below 20 slots.
    let (address, number) = (virtio_address(slot) as u32, slot as u8);
    let name = format!("VI{slot:02}");
    aml::Scope::new(
        Path::new("\\_SB_"),
        vec![&aml::Device::new(
            Path::new(&name),
            vec![
                &aml::Name::new(Path::new("_HID"), &VIRTIO_ID),
                &aml::Name::new(Path::new("_UID"), &number),
                &aml::Name::new(
                    Path::new("_CRS"),
                    &aml::ResourceTemplate::new(vec![
                        &aml::Memory32Fixed::new(true, address, VIRTIO_SIZE as u32),
                        &aml::Interrupt::new(true, true, false, false, line),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at an address, its checksum checked.
    fn table(tables: &[u8], address: u64) -> &[u8] {
        let start = (address - ACPI_START) as usize;
        let len = u32_at(tables, start + 4) as usize;
        let table = &tables[start..start + len];
        let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0, "checksum of {:?}", &table[..4]);
        table
    }

    #[test]
    fn a_kernel_finds_everything_from_the_root() {
        let tables = tables(3).unwrap();
        assert_eq!(&tables[..8], b"RSD PTR ");
        let xsdt = table(&tables, u64_at(&tables, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(&tables, u64_at(xsdt, 36));
        let madt = table(&tables, u64_at(xsdt, 44));
        assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
        assert_eq!(u32_at(fadt, 56), u32::from(PM_EVENT_PORT));
        assert_eq!(u32_at(fadt, 64), u32::from(PM_CONTROL_PORT));
        let dsdt = table(&tables, u64::from(u32_at(fadt, 40)));
        assert_eq!(&dsdt[..4], b"DSDT");
        let devices = dsdt.windows(8).filter(|w| w == b"LNRO0005").count();
        assert_eq!(devices, VIRTIO_LINES.len());
        assert_eq!(u32_at(fadt, 36) % 64, 0, "the FACS is aligned");
        // Type 0, 8 bytes long: a processor; type 1: the I/O interrupt controller.
        let processors = (0..3).map(|cpu| &madt[44 + cpu * 8..][..4]);
        for (cpu, entry) in processors.enumerate() {
            assert_eq!(entry, [0, 8, cpu as u8, cpu as u8]);
        }
        assert_eq!(&madt[44 + 24..][..2], [1, 12]);
    }

    #[test]
    fn they_fit_with_as_many_processors_as_there_can_be() {
        assert!(tables(254).is_some());
    }
}
