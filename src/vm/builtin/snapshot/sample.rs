//! A state of a machine that never was, for tests and fuzz targets.

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

use super::fit::MadeFor;
use super::format::{Chips, MAGIC, Processor, State, VERSION};
use super::plain::Plain;
use crate::vm::VmSize;
use crate::vm::builtin::memory::Extent;
use crate::vm::builtin::ports::SavedSerial;

/// Of a machine with one processor and 16 MiB.
pub fn state() -> State {
    let processor = Processor {
        cpuid: vec![Plain(kvm_cpuid_entry2::default())],
        tsc_khz: 1_000_000,
        activity: Plain(kvm_mp_state::default()),
        regs: Plain(kvm_regs::default()),
        sregs: Plain(kvm_sregs::default()),
        xsave: Plain(kvm_xsave::default()),
        xcrs: Plain(kvm_xcrs::default()),
        debug: Plain(kvm_debugregs::default()),
        lapic: Plain(kvm_lapic_state::default()),
        events: Plain(kvm_vcpu_events::default()),
        msrs: vec![(0x10, 5), (0x6e0, u64::MAX)],
    };
    State {
        made_for: MadeFor::of_test(VmSize {
            vcpus: 1,
            memory_mib: 16,
        }),
        created: 1,
        extents: vec![
            Extent {
                offset: 0,
                len: 0x1000,
            },
            Extent {
                offset: 0x1_0000,
                len: 0x2000,
            },
        ],
        chips: Chips {
            interrupts: [Plain(kvm_irqchip::default()); 3],
            timer: Plain(kvm_pit_state2::default()),
            clock: Plain(kvm_clock_data::default()),
        },
        processors: vec![processor],
        serial: SavedSerial::default(),
        devices: Vec::new(),
    }
}

/// A file with a correct first line.
pub fn file(json: &[u8]) -> Vec<u8> {
    let head = format!(
        "{MAGIC} {VERSION} {} {:08x}\n",
        json.len(),
        crc32fast::hash(json)
    );
    [head.as_bytes(), json].concat()
}
