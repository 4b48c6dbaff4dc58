//! What KVM has of a machine besides its processors.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::Error;
use super::format::Chips;
use super::plain::Plain;

/// Asks for everything. The processors have been stopped.
///
/// # Errors
/// KVM refuses.
pub fn save(vm: &VmFd) -> Result<Chips, Error> {
    let interrupts = |chip_id| -> Result<_, Error> {
        let mut chip = kvm_irqchip {
            chip_id,
            ..kvm_irqchip::default()
        };
        vm.get_irqchip(&mut chip)
            .map_err(Error::kvm("an interrupt controller"))?;
        Ok(Plain(chip))
    };
    Ok(Chips {
        interrupts: [
            interrupts(KVM_IRQCHIP_PIC_MASTER)?,
            interrupts(KVM_IRQCHIP_PIC_SLAVE)?,
            interrupts(KVM_IRQCHIP_IOAPIC)?,
        ],
        timer: Plain(vm.get_pit2().map_err(Error::kvm("the timer"))?),
        clock: Plain(vm.get_clock().map_err(Error::kvm("the clock"))?),
    })
}

/// Sets everything. The processors have their state.
///
/// # Errors
/// KVM refuses.
pub fn restore(vm: &VmFd, saved: &Chips) -> Result<(), Error> {
    vm.set_pit2(&saved.timer.0)
        .map_err(Error::kvm("the timer"))?;
    // It goes on where it was: the time in between is none of the guest's, whose
    // watchdogs would wonder. Flags would have KVM add it.
    let clock = kvm_clock_data {
        clock: saved.clock.0.clock,
        ..kvm_clock_data::default()
    };
    vm.set_clock(&clock).map_err(Error::kvm("the clock"))?;
    for (chip_id, chip) in (0..).zip(&saved.interrupts) {
        let chip = kvm_irqchip { chip_id, ..chip.0 };
        vm.set_irqchip(&chip)
            .map_err(Error::kvm("an interrupt controller"))?;
    }
    Ok(())
}
