//! A virtual processor: how it is set up, and what its exits mean.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};

use super::cpuid;
use super::layout::START_INFO;
use super::machine::Board;
use super::ports::Request;

/// Where a processor of the machine stands after it has run for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It can go on.
    Continue,
    /// It was interrupted, or there was something to be done before it goes on.
    Interrupted,
    Request(Request),
    /// The processor reset itself, because it could not even handle a fault. Where it was.
    TripleFault(String),
    /// It cannot go on.
    Broken(String),
}

/// Makes the processor `number` of `count`. All but the first wait to be started by
/// the guest.
///
/// # Errors
/// KVM refuses.
pub fn create(kvm: &Kvm, vm: &VmFd, number: u8, count: u8) -> Result<VcpuFd, kvm_ioctls::Error> {
    let vcpu = vm.create_vcpu(number.into())?;
    let mut supported = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
    let tsc_deadline = vm.check_extension(Cap::TscDeadlineTimer);
    cpuid::adapt(&mut supported, number, count, tsc_deadline);
    vcpu.set_cpuid2(&supported)?;
    set_msrs(&vcpu)?;
    set_local_interrupts(&vcpu)?;
    Ok(vcpu)
}

/// The first processor starts here, as the PVH boot protocol has it: 32-bit mode,
/// flat segments, no paging, the start info in ebx.
///
/// # Errors
/// KVM refuses.
pub fn set_entry(vcpu: &VcpuFd, entry: u64) -> Result<(), kvm_ioctls::Error> {
    let mut special = vcpu.get_sregs()?;
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 0x8,
        type_: 11, // execute, read, accessed
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment {
        selector: 0x10,
        type_: 3, // read, write, accessed
        ..code
    };
    special.cs = code;
    (special.ds, special.es, special.ss) = (data, data, data);
    (special.fs, special.gs) = (data, data);
    special.tr = kvm_segment {
        limit: 0x67,
        selector: 0x18,
        type_: 11, // a busy 32-bit TSS
        present: 1,
        ..kvm_segment::default()
    };
    special.cr0 = CR0_PE | CR0_ET;
    special.cr4 = 0;
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rbx: START_INFO,
        rflags: 2, // the bit that is always set
        ..kvm_regs::default()
    })
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;

/// What a firmware would leave: fast string instructions, and memory that is
/// cached (Intel SDM volume 3, 12.11.2.1: MTRRs enabled, default write-back).
fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const MISC_ENABLE: u32 = 0x1a0;
    const MTRR_DEFAULT: u32 = 0x2ff;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    let entries = [entry(MISC_ENABLE, 1), entry(MTRR_DEFAULT, 1 << 11 | 6)];
    // Two entries are not too many.
    let Ok(msrs) = Msrs::from_entries(&entries) else {
        return Err(kvm_ioctls::Error::new(libc::E2BIG));
    };
    if vcpu.set_msrs(&msrs)? != entries.len() {
        return Err(kvm_ioctls::Error::new(libc::EINVAL));
    }
    Ok(())
}

/// Wires the old interrupt controller and the NMI to the pins where a PC has them.
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    // Offsets of the local vector table, and the delivery modes in it (Intel SDM
    // volume 3, 11.5.1).
    const PINS: [(usize, u32); 2] = [(0x350, 0x700), (0x360, 0x400)];
    let mut lapic = vcpu.get_lapic()?;
    for (offset, mode) in PINS {
        for (index, byte) in mode.to_le_bytes().into_iter().enumerate() {
            // One of the low bytes of a register of 4: a mask bit is kept out too.
            lapic.regs[offset + index] = byte as i8;
        }
    }
    vcpu.set_lapic(&lapic)
}

/// What a processor did last outside of itself, for the message of an end that nobody
/// asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trail {
    accesses: u64,
    last: Option<(&'static str, u64)>,
}

impl Trail {
    fn note(&mut self, what: &'static str, address: impl Into<u64>) {
        self.accesses = self.accesses.wrapping_add(1);
        self.last = Some((what, address.into()));
    }

    /// Where the processor is. After a triple fault an AMD processor's registers may be
    /// those after a reset.
    fn describe(&self, vcpu: &VcpuFd) -> String {
        let mut text = match (vcpu.get_regs(), vcpu.get_sregs()) {
            (Ok(regs), Ok(special)) => format!(
                "rip {:#x}, rsp {:#x}, cr0 {:#x}, cr2 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}",
                regs.rip,
                regs.rsp,
                special.cr0,
                special.cr2,
                special.cr3,
                special.cr4,
                special.efer
            ),
            (Err(e), _) | (_, Err(e)) => format!("its registers are unknown: {e}"),
        };
        match self.last {
            Some((what, address)) => text.push_str(&format!(
                "; its last access of {} was {what} {address:#x}",
                self.accesses
            )),
            None => text.push_str("; it had no access to a device"),
        }
        text
    }
}

/// Runs the processor until something is to be done outside of it, and does it.
pub fn run(vcpu: &mut VcpuFd, board: &Board, trail: &mut Trail) -> Exit {
    match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            trail.note("reading port", port);
            board.port_read(port, data);
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            trail.note("writing port", port);
            if let Some(request) = board.port_write(port, data) {
                return Exit::Request(request);
            }
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            trail.note("reading", address);
            board.read(address, data);
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            trail.note("writing", address);
            board.write(address, data);
        }
        Ok(VcpuExit::Intr) => return Exit::Interrupted,
        Ok(VcpuExit::Shutdown) => return Exit::TripleFault(trail.describe(vcpu)),
        Ok(VcpuExit::SystemEvent(kind, _)) => {
            return Exit::Broken(format!("an unexpected system event ({kind})"));
        }
        Ok(VcpuExit::InternalError) => {
            let place = trail.describe(vcpu);
            return Exit::Broken(format!("an internal error of KVM ({place})"));
        }
        Ok(VcpuExit::FailEntry(reason, _)) => {
            return Exit::Broken(format!("KVM cannot enter the guest ({reason:#x})"));
        }
        Ok(other) => return Exit::Broken(format!("an unexpected exit of KVM: {other:?}")),
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Exit::Interrupted,
        Err(e) => {
            let e = std::io::Error::from_raw_os_error(e.errno());
            return Exit::Broken(format!("KVM_RUN: {e}"));
        }
    }
    Exit::Continue
}

/// Finishes what the processor was in the middle of, without going on: the result of an
/// access that was handled is only in its registers when KVM has run once more (KVM's API
/// documentation, 5, `KVM_EXIT_MMIO`).
pub fn settle(vcpu: &mut VcpuFd, board: &Board, trail: &mut Trail) -> Exit {
    vcpu.set_kvm_immediate_exit(1);
    let exit = loop {
        match run(vcpu, board, trail) {
            // Another part of the same access.
            Exit::Continue => {}
            exit => break exit,
        }
    };
    vcpu.set_kvm_immediate_exit(0);
    exit
}
