//! Which hypervisor runs a VM.

use crate::config::{Config, Hypervisor};

/// The hypervisor of a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Inside the sandboxer. It may have been configured where KVM does not work,
    /// which is an error.
    Builtin,
    /// With KVM or with emulation, as `qemu.accel` has it.
    Qemu,
}

/// Decides. The built-in VMM takes no network interfaces and disks yet, so it is
/// only taken when it is asked for.
#[must_use]
pub fn choose(config: &Config) -> Choice {
    match config.hypervisor {
        Hypervisor::Builtin => Choice::Builtin,
        Hypervisor::Auto | Hypervisor::Qemu => Choice::Qemu,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builtin_one_is_taken_when_it_is_asked_for() {
        for (hypervisor, choice) in [
            (Hypervisor::Auto, Choice::Qemu),
            (Hypervisor::Qemu, Choice::Qemu),
            (Hypervisor::Builtin, Choice::Builtin),
        ] {
            let config = Config {
                hypervisor,
                ..Config::default()
            };
            assert_eq!(choose(&config), choice);
        }
    }
}
