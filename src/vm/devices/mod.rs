//! Devices that run in the sandboxer and are reached by every hypervisor.
