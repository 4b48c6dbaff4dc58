//! What the guest's processors say about themselves (CPUID).
//!
//! The host's processor as far as KVM can pass it on, minus what would let a guest
//! be a hypervisor of its own or count the host's events, plus each processor's
//! place in the machine: one socket, one thread per core.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Bits of ECX of leaf 1.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Bit of EDX of leaf 1: EBX has the number of processors.
const HTT: u32 = 1 << 28;
/// Bits of ECX of leaf 0x80000001.
const SVM: u32 = 1 << 2;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// Adapts what KVM supports to the processor `cpu` of `count`.
///
/// `tsc_deadline`: KVM emulates the timer of that name, which it does not list.
pub fn adapt(cpuid: &mut CpuId, cpu: u8, count: u8, tsc_deadline: bool) {
    // Number of bits it takes to number the processors.
    let bits = u8::BITS - (count - 1).leading_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ecx = entry.ecx & !VMX | HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                if count > 1 {
                    entry.edx |= HTT;
                }
                let cache_line = entry.ebx & 0x0000_ff00;
                entry.ebx = u32::from(cpu) << 24 | u32::from(count) << 16 | cache_line;
            }
            0x4 => caches_of_one_core(entry, count),
            // Performance counters.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0xb | 0x1f => topology(entry, cpu, count, bits),
            0x8000_0001 => entry.ecx &= !(SVM | TOPOLOGY_EXTENSIONS),
            0x8000_0008 => {
                let number = u32::from(count) - 1;
                entry.ecx = entry.ecx & !0xf0ff | bits << 12 | number;
            }
            // SVM's own features, and the topology that was taken out above.
            0x8000_000a | 0x8000_001e => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            _ => {}
        }
    }
}

/// Intel's description of caches: the last one is shared by all processors.
fn caches_of_one_core(entry: &mut kvm_cpuid_entry2, count: u8) {
    let level = entry.eax >> 5 & 7;
    if entry.eax & 0x1f == 0 {
        return;
    }
    let sharing = if level >= 3 { u32::from(count) - 1 } else { 0 };
    entry.eax = entry.eax & 0x3fff | sharing << 14 | (u32::from(count) - 1) << 26;
}

/// Levels "thread" and "core" of the extended topology.
fn topology(entry: &mut kvm_cpuid_entry2, cpu: u8, count: u8, bits: u32) {
    entry.edx = cpu.into();
    let (shift, number, level) = match entry.index {
        0 => (0, 1, 1),
        1 => (bits, u32::from(count), 2),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = number;
    entry.ecx = level << 8 | entry.index;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(cpu: u8, count: u8) -> CpuId {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: 0,
            ..kvm_cpuid_entry2::default()
        };
        let leaves = [
            (0x1, 0),
            (0xa, 0),
            (0xb, 0),
            (0xb, 1),
            (0x8000_0001, 0),
            (0x8000_0008, 0),
        ];
        let entries = leaves.map(|(function, index)| entry(function, index));
        let mut cpuid = CpuId::from_entries(&entries).unwrap();
        adapt(&mut cpuid, cpu, count, true);
        cpuid
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut entries = cpuid.as_slice().iter();
        *entries
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn a_guest_cannot_be_a_hypervisor_nor_count() {
        let cpuid = adapted(0, 1);
        assert_eq!(leaf(&cpuid, 1, 0).ecx & VMX, 0);
        assert_ne!(leaf(&cpuid, 1, 0).ecx & HYPERVISOR, 0);
        assert_ne!(leaf(&cpuid, 1, 0).ecx & TSC_DEADLINE, 0);
        assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx & SVM, 0);
        assert_eq!(leaf(&cpuid, 0xa, 0).eax, 0);
    }

    #[test]
    fn every_processor_knows_its_number_and_how_many_there_are() {
        for (cpu, count, bits) in [(0, 1, 0), (1, 2, 1), (2, 3, 2), (63, 64, 6), (200, 254, 8)] {
            let cpuid = adapted(cpu, count);
            let ebx = leaf(&cpuid, 1, 0).ebx;
            assert_eq!((ebx >> 24, ebx >> 16 & 0xff), (cpu.into(), count.into()));
            let core = leaf(&cpuid, 0xb, 1);
            assert_eq!(
                (core.eax, core.ebx, core.edx),
                (bits, count.into(), cpu.into())
            );
            assert_eq!(leaf(&cpuid, 0xb, 0).eax, 0, "one thread per core");
            let amd = leaf(&cpuid, 0x8000_0008, 0).ecx;
            assert_eq!((amd & 0xff, amd >> 12 & 0xf), (u32::from(count) - 1, bits));
        }
    }
}
