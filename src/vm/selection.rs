//! Which hypervisor runs a VM.

use crate::config::{Accel, Config, Hypervisor};
use crate::vm::detect::KvmStatus;

/// The hypervisor of a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Inside the sandboxer. It may have been configured where KVM does not work,
    /// which is an error.
    Builtin,
    /// With KVM or with emulation, as `qemu.accel` has it.
    Qemu,
}

/// Decides. The built-in VMM is taken where KVM works, unless emulation is asked for;
/// `kvm` finds that out, and is only asked when it matters.
#[must_use]
pub fn choose(config: &Config, kvm: impl FnOnce() -> KvmStatus) -> Choice {
    match (config.hypervisor, config.qemu.accel) {
        (Hypervisor::Builtin, _) => Choice::Builtin,
        (Hypervisor::Qemu, _) | (Hypervisor::Auto, Accel::Tcg) => Choice::Qemu,
        (Hypervisor::Auto, Accel::Auto | Accel::Kvm) => match kvm() {
            KvmStatus::Usable => Choice::Builtin,
            // With `qemu.accel = "kvm"` it is QEMU's error.
            KvmStatus::Unusable { .. } | KvmStatus::Absent => Choice::Qemu,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(hypervisor: Hypervisor, accel: Accel, kvm: Option<KvmStatus>) -> Choice {
        let mut config = Config {
            hypervisor,
            ..Config::default()
        };
        config.qemu.accel = accel;
        choose(&config, || kvm.expect("nobody has to ask for KVM"))
    }

    #[test]
    fn what_is_asked_for_is_taken() {
        for accel in [Accel::Auto, Accel::Kvm, Accel::Tcg] {
            assert_eq!(chosen(Hypervisor::Builtin, accel, None), Choice::Builtin);
            assert_eq!(chosen(Hypervisor::Qemu, accel, None), Choice::Qemu);
        }
        assert_eq!(chosen(Hypervisor::Auto, Accel::Tcg, None), Choice::Qemu);
    }

    #[test]
    fn the_builtin_one_is_taken_where_kvm_works() {
        let slow = KvmStatus::Unusable {
            reason: "it only emulates".into(),
        };
        for accel in [Accel::Auto, Accel::Kvm] {
            for (kvm, choice) in [
                (KvmStatus::Usable, Choice::Builtin),
                (slow.clone(), Choice::Qemu),
                (KvmStatus::Absent, Choice::Qemu),
            ] {
                assert_eq!(chosen(Hypervisor::Auto, accel, Some(kvm)), choice);
            }
        }
    }
}
