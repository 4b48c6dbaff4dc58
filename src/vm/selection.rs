//! Which hypervisor runs a VM, and why.

use crate::config::{Accel, Config, Hypervisor};
use crate::vm::detect::KvmStatus;

/// The hypervisor for a configuration on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Inside the sandboxer. It may have been configured where KVM does not work,
    /// which is an error.
    Builtin,
    Qemu(WhyQemu),
}

/// Why QEMU is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WhyQemu {
    Configured,
    /// `hypervisor` is "auto", but there are keys that only QEMU has.
    Keys,
    /// The kernel is not an ELF: it is a bzImage, or it is not there.
    Kernel,
    NoKvm(KvmStatus),
}

/// Decides. KVM is asked only when the answer matters.
pub fn choose(config: &Config, kvm: impl FnOnce() -> KvmStatus) -> Choice {
    match config.hypervisor {
        Hypervisor::Builtin => return Choice::Builtin,
        Hypervisor::Qemu => return Choice::Qemu(WhyQemu::Configured),
        Hypervisor::Auto => {}
    }
    if config.qemu.accel != Accel::Auto || !config.qemu.extra_args.is_empty() {
        return Choice::Qemu(WhyQemu::Keys);
    }
    if !is_elf(&config.guest.kernel) {
        return Choice::Qemu(WhyQemu::Kernel);
    }
    match kvm() {
        KvmStatus::Usable => Choice::Builtin,
        status => Choice::Qemu(WhyQemu::NoKvm(status)),
    }
}

fn is_elf(kernel: &std::path::Path) -> bool {
    let mut magic = [0; 4];
    std::fs::File::open(kernel)
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut magic))
        .is_ok_and(|()| magic == *b"\x7fELF")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(kvm: KvmStatus, edit: impl FnOnce(&mut Config)) -> Choice {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.guest.kernel = dir.path().join("vmlinux");
        std::fs::write(&config.guest.kernel, "\x7fELF and so on").unwrap();
        edit(&mut config);
        choose(&config, || kvm)
    }

    #[test]
    fn the_best_that_works() {
        assert_eq!(choice(KvmStatus::Usable, |_| ()), Choice::Builtin);
        let broken = KvmStatus::Unusable {
            reason: "slow".into(),
        };
        for status in [KvmStatus::Absent, broken] {
            let expected = Choice::Qemu(WhyQemu::NoKvm(status.clone()));
            assert_eq!(choice(status, |_| ()), expected);
        }
    }

    #[test]
    fn what_is_configured_is_taken() {
        let builtin = choice(KvmStatus::Absent, |c| c.hypervisor = Hypervisor::Builtin);
        assert_eq!(builtin, Choice::Builtin);
        let qemu = choice(KvmStatus::Usable, |c| c.hypervisor = Hypervisor::Qemu);
        assert_eq!(qemu, Choice::Qemu(WhyQemu::Configured));
    }

    #[test]
    fn keys_that_only_qemu_has_ask_for_it() {
        let keys = Choice::Qemu(WhyQemu::Keys);
        for accel in [Accel::Kvm, Accel::Tcg] {
            assert_eq!(choice(KvmStatus::Usable, |c| c.qemu.accel = accel), keys);
        }
        let with = |c: &mut Config| c.qemu.extra_args = vec!["-s".into()];
        assert_eq!(choice(KvmStatus::Usable, with), keys);
    }

    #[test]
    fn a_compressed_kernel_needs_qemu() {
        let compressed = choice(KvmStatus::Usable, |c| {
            std::fs::write(&c.guest.kernel, "MZ").unwrap();
        });
        assert_eq!(compressed, Choice::Qemu(WhyQemu::Kernel));
    }
}
