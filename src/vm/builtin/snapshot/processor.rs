//! The state of a virtual processor, out of KVM and into it.
//!
//! The order matters (KVM's API documentation, and what other hypervisors found out): the
//! activity comes first, because asking for it settles what waits to be delivered, and the
//! events last. On the way back CPUID decides what may be set at all, the APIC's base is one
//! of the special registers, the timer of the APIC is programmed by a register that is only
//! taken when the APIC is in its mode, and after the counter it is compared with.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::Error;
use super::format::Processor;
use super::plain::Plain;

/// Most registers in one request.
const MSRS_AT_ONCE: usize = 128;
const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
/// As a distance of time stamps, more than a second of any processor.
const FAR: u64 = 1 << 40;
/// Memory that is cached (MTRR_DEFAULT), which not every KVM lists.
const ALSO: [u32; 1] = [0x2ff];

/// The registers that make up the state of a processor, as far as this KVM has them.
///
/// # Errors
/// As KVM_GET_MSR_INDEX_LIST.
pub fn msrs(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let list = kvm
        .get_msr_index_list()
        .map_err(Error::kvm("listing registers"))?;
    let mut numbers = list.as_slice().to_vec();
    numbers.extend(ALSO);
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// Asks for everything. The processor has been stopped.
///
/// # Errors
/// KVM refuses.
pub fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Processor, Error> {
    let e = Error::kvm;
    let activity = vcpu.get_mp_state().map_err(e("a CPU's activity"))?;
    let regs = vcpu.get_regs().map_err(e("a CPU's registers"))?;
    let sregs = vcpu.get_sregs().map_err(e("a CPU's special registers"))?;
    let xsave = vcpu.get_xsave().map_err(e("a CPU's vector registers"))?;
    let xcrs = vcpu.get_xcrs().map_err(e("a CPU's extended controls"))?;
    let debug = vcpu.get_debug_regs().map_err(e("a CPU's breakpoints"))?;
    let lapic = vcpu.get_lapic().map_err(e("a CPU's APIC"))?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(e("a CPU's frequency"))?;
    let cpuid = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(e("a CPU's features"))?;
    let msrs = read_msrs(vcpu, msrs)?;
    let events = vcpu.get_vcpu_events().map_err(e("a CPU's events"))?;
    Ok(Processor {
        cpuid: cpuid.as_slice().iter().copied().map(Plain).collect(),
        tsc_khz,
        activity: Plain(activity),
        regs: Plain(regs),
        sregs: Plain(sregs),
        xsave: Plain(xsave),
        xcrs: Plain(xcrs),
        debug: Plain(debug),
        lapic: Plain(lapic),
        events: Plain(events),
        msrs,
    })
}

/// Sets the time stamp counter of the first processor to something else than it will have.
///
/// KVM takes a time stamp within a second of what another processor was given, or what it
/// made a new one begin with, for an attempt to have them run alike, and ignores its value
/// (before Linux 6.7 also this first one, arch/x86/kvm/x86.c). The counter of a machine that
/// was saved in its first second would go back, and its clock stand still until it is there
/// again.
///
/// # Errors
/// KVM refuses.
pub fn forget_time(vcpu: &VcpuFd, saved: &Processor) -> Result<(), Error> {
    let tsc = saved.msrs.iter().find(|(number, _)| *number == TSC);
    tsc.map_or(Ok(()), |(_, value)| {
        write_msrs(vcpu, &[(TSC, value.wrapping_add(FAR))])
    })
}

/// Makes a new processor what a saved one was.
///
/// # Errors
/// KVM refuses.
pub fn restore(vcpu: &VcpuFd, saved: &Processor) -> Result<(), Error> {
    let e = Error::kvm;
    let cpuid: Vec<_> = saved.cpuid.iter().map(|entry| entry.0).collect();
    let cpuid = CpuId::from_entries(&cpuid)
        .map_err(|e| Error::Misfit(format!("the features of a CPU: {e:?}")))?;
    vcpu.set_cpuid2(&cpuid).map_err(e("a CPU's features"))?;
    let khz = vcpu.get_tsc_khz().map_err(e("a CPU's frequency"))?;
    if khz != saved.tsc_khz {
        vcpu.set_tsc_khz(saved.tsc_khz)
            .map_err(e("a CPU's frequency"))?;
    }
    vcpu.set_mp_state(saved.activity.0)
        .map_err(e("a CPU's activity"))?;
    vcpu.set_regs(&saved.regs.0)
        .map_err(e("a CPU's registers"))?;
    vcpu.set_sregs(&saved.sregs.0)
        .map_err(e("a CPU's special registers"))?;
    // SAFETY: the kernel reads more than the structure only of a process that has been
    // given larger vector registers, which this one has not asked for.
    unsafe { vcpu.set_xsave(&saved.xsave.0) }.map_err(e("a CPU's vector registers"))?;
    vcpu.set_xcrs(&saved.xcrs.0)
        .map_err(e("a CPU's extended controls"))?;
    vcpu.set_debug_regs(&saved.debug.0)
        .map_err(e("a CPU's breakpoints"))?;
    vcpu.set_lapic(&saved.lapic.0).map_err(e("a CPU's APIC"))?;
    let (last, first): (Vec<_>, Vec<_>) = saved
        .msrs
        .iter()
        .copied()
        .partition(|msr| msr.0 == TSC_DEADLINE);
    write_msrs(vcpu, &first)?;
    write_msrs(vcpu, &last)?;
    vcpu.set_vcpu_events(&saved.events.0)
        .map_err(e("a CPU's events"))
}

fn entry((index, data): (u32, u64)) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    }
}

fn entries(msrs: &[(u32, u64)]) -> Result<Msrs, Error> {
    let entries: Vec<_> = msrs.iter().copied().map(entry).collect();
    Msrs::from_entries(&entries).map_err(|e| Error::Misfit(format!("registers of a CPU: {e:?}")))
}

/// Those of the list that this processor has.
fn read_msrs(vcpu: &VcpuFd, numbers: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    let mut values = Vec::with_capacity(numbers.len());
    let mut left = numbers;
    while !left.is_empty() {
        let count = left.len().min(MSRS_AT_ONCE);
        let asked: Vec<_> = left[..count].iter().map(|number| (*number, 0)).collect();
        let mut asked = entries(&asked)?;
        let got = vcpu
            .get_msrs(&mut asked)
            .map_err(Error::kvm("registers of a CPU"))?;
        let read = asked.as_slice().iter().take(got);
        values.extend(read.map(|entry| (entry.index, entry.data)));
        // It stops at one that the processor has not.
        let skipped = usize::from(got < count);
        left = &left[got + skipped..];
    }
    Ok(values)
}

fn write_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), Error> {
    let mut left = msrs;
    while !left.is_empty() {
        let count = left.len().min(MSRS_AT_ONCE);
        let set = vcpu
            .set_msrs(&entries(&left[..count])?)
            .map_err(Error::kvm("registers of a CPU"))?;
        let mut done = set;
        if set < count {
            // One that cannot be set, or not to this: that is fine if it is this.
            let (number, value) = left[set];
            if read_msrs(vcpu, &[number])?.first() != Some(&(number, value)) {
                return Err(Error::Misfit(format!(
                    "the CPU's register {number:#x} cannot be {value:#x}"
                )));
            }
            done += 1;
        }
        left = &left[done..];
    }
    Ok(())
}
