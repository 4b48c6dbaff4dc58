//! The guest that tells a real KVM from an emulating one.
//!
//! It runs in 64-bit mode without an operating system: identity-mapped first
//! 2 MiB, no interrupt table, so that any fault ends it. A loop shows the speed,
//! then come instructions that KVM's own emulator does not know and that every
//! kernel uses early. Each is executed only where KVM offers it to guests, as a
//! kernel would do.

use std::io;
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// Rounds of the loop, five instructions each: below 1 ms on a processor, some
/// 20 ms in a VM under emulation, 1.7 s where every instruction goes through
/// KVM's emulator (1.1 µs each were measured).
const ROUNDS: u64 = 300_000;

// Guest-physical layout, one page each.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
/// 64-byte aligned, zero: XRSTOR takes it as the initial state.
const XSAVE_AREA: u64 = 0x5000;
const STACK_TOP: u64 = 0x7000;
const MEMORY_SIZE: usize = 0x8000;

/// Where the guest writes its result.
const RESULT_PORT: u16 = 0xf4;

// Bits of esi: which instructions to execute.
const HAS_CMPXCHG16B: u64 = 1;
const HAS_POPCNT: u64 = 2;
const HAS_XSAVE: u64 = 4;
const HAS_SMAP: u64 = 8;

/// What the guest writes to the result port; the order of the steps below.
const FAILED_STEPS: [&str; 4] = ["", "loop", "cmpxchg16b", "popcnt"];

// ecx: rounds, esi: HAS_* bits, rdi: XSAVE_AREA, rsp: STACK_TOP.
// dl holds the number of the step until the result is written.
std::arch::global_asm!(
    ".pushsection .rodata.kvm_probe_guest, \"a\"",
    ".globl kuasar_kvm_probe_guest_start",
    "kuasar_kvm_probe_guest_start:",
    "xor r8d, r8d",
    "mov r9d, ecx",
    "2:",
    "push rcx",
    "pop rax",
    "add r8d, 1",
    "dec ecx",
    "jnz 2b",
    "mov al, 1",
    "cmp r8d, r9d",
    "jne 9f",
    "test esi, 1",
    "jz 3f",
    "sub rsp, 16",
    "xor eax, eax",
    "xor edx, edx",
    "mov [rsp], rax",
    "mov [rsp + 8], rax",
    "mov ebx, 0x1234",
    "mov ecx, 0x5678",
    "lock cmpxchg16b [rsp]",
    "mov al, 2",
    "jnz 9f",
    "cmp qword ptr [rsp], 0x1234",
    "jne 9f",
    "cmp qword ptr [rsp + 8], 0x5678",
    "jne 9f",
    "3:",
    "test esi, 2",
    "jz 4f",
    "mov ebx, 0xff0f",
    "popcnt ecx, ebx",
    "mov al, 3",
    "cmp ecx, 12",
    "jne 9f",
    "4:",
    "test esi, 4",
    "jz 5f",
    "mov eax, 3",
    "xor edx, edx",
    "xrstor [rdi]",
    "5:",
    "test esi, 8",
    "jz 6f",
    "clac",
    "6:",
    "xor eax, eax",
    "9:",
    "out 0xf4, al",
    "hlt",
    ".globl kuasar_kvm_probe_guest_end",
    "kuasar_kvm_probe_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static kuasar_kvm_probe_guest_start: u8;
    static kuasar_kvm_probe_guest_end: u8;
}

fn code() -> &'static [u8] {
    // SAFETY: both symbols lie in the same read-only section of this binary, the
    // second behind the first.
    unsafe {
        let start = &raw const kuasar_kvm_probe_guest_start;
        let end = &raw const kuasar_kvm_probe_guest_end;
        std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    }
}

/// Runs the guest to its end. `Err` is the reason why KVM does not work.
///
/// May take for ever and may not even be killable for a while: to be called in a
/// process of its own.
pub(super) fn run() -> Result<(), String> {
    let failed = |step: &'static str| {
        move |e: kvm_ioctls::Error| {
            format!("{step} failed: {}", io::Error::from_raw_os_error(e.errno()))
        }
    };
    let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
    if kvm.get_api_version() != 12 {
        return Err("it is not version 12 of the KVM interface".into());
    }
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    add_memory(&vm).map_err(|e| format!("adding memory to the VM failed: {e}"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    set_registers(&vcpu, features(&cpuid)).map_err(failed("setting the registers"))?;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(RESULT_PORT, [0])) => return Ok(()),
            Ok(VcpuExit::IoOut(RESULT_PORT, [step])) => {
                let step = FAILED_STEPS.get(usize::from(*step)).unwrap_or(&"unknown");
                return Err(format!("it executes an instruction wrongly ({step})"));
            }
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::InternalError) => {
                return Err("internal error of KVM while it executed a guest".into());
            }
            Ok(VcpuExit::Shutdown) => return Err("a fault in correct guest code".into()),
            Ok(other) => return Err(format!("unexpected exit of the guest: {other:?}")),
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(failed("KVM_RUN")(e)),
        }
    }
}

/// How long this process takes for about the same loop.
pub(super) fn native_time() -> Duration {
    let start = Instant::now();
    let mut sum = 0u32;
    for round in 0..ROUNDS {
        // As many instructions, two of them on memory.
        sum = std::hint::black_box(sum).wrapping_add(std::hint::black_box(round) as u32);
    }
    std::hint::black_box(sum);
    start.elapsed()
}

/// The instructions that KVM says guests may use.
fn features(cpuid: &CpuId) -> u64 {
    let find = |function| {
        let entries = cpuid.as_slice().iter();
        entries
            .filter(|entry| entry.function == function && entry.index == 0)
            .fold((0, 0), |_, entry| (entry.ebx, entry.ecx))
    };
    // Intel SDM volume 2, CPUID, leaves 1 and 7.
    let (_, ecx1) = find(1);
    let (ebx7, _) = find(7);
    let bit = |register: u32, bit: u32, flag: u64| if register >> bit & 1 == 1 { flag } else { 0 };
    bit(ecx1, 13, HAS_CMPXCHG16B)
        | bit(ecx1, 23, HAS_POPCNT)
        | bit(ecx1, 26, HAS_XSAVE)
        | bit(ebx7, 20, HAS_SMAP)
}

fn add_memory(vm: &VmFd) -> io::Result<()> {
    // SAFETY: a new private mapping; nothing else refers to it.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            MEMORY_SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping is this long, zeroed, writable, and never unmapped: the
    // process ends with the probe.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.cast::<u8>(), MEMORY_SIZE) };
    // Present and writable; the last one is a 2 MiB page at address 0.
    for (table, entry) in [(PML4, PDPT | 3), (PDPT, PD | 3), (PD, 0x83)] {
        write(bytes, table, &entry.to_le_bytes())?;
    }
    write(bytes, CODE, code())?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_SIZE as u64,
        userspace_addr: memory as u64,
    };
    // SAFETY: the region is the mapping above, which outlives the VM.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

fn write(memory: &mut [u8], address: u64, data: &[u8]) -> io::Result<()> {
    let start = usize::try_from(address).map_err(io::Error::other)?;
    let place = memory.get_mut(start..start + data.len());
    let place = place.ok_or(io::ErrorKind::InvalidInput)?;
    place.copy_from_slice(data);
    Ok(())
}

/// 64-bit mode at the start of the code.
fn set_registers(vcpu: &VcpuFd, features: u64) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 8,
        type_: 11, // execute, read, accessed
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3, // read, write, accessed
        db: 1,
        l: 0,
        ..code
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.cr3 = PML4;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    if features & HAS_XSAVE != 0 {
        sregs.cr4 |= CR4_OSXSAVE;
    }
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)?;

    let mut regs = vcpu.get_regs()?;
    regs.rip = CODE;
    regs.rsp = STACK_TOP;
    regs.rflags = 2; // the bit that is always set
    regs.rcx = ROUNDS;
    regs.rsi = features;
    regs.rdi = XSAVE_AREA;
    vcpu.set_regs(&regs)
}

// Intel SDM volume 3, section 2.5 (control registers) and 2.2.1 (EFER).
const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_its_page() {
        let code = code();
        assert!(code.len() > 64 && code.len() < 0x1000, "{}", code.len());
        assert_eq!(code.last(), Some(&0xf4), "it ends with hlt");
    }
}
