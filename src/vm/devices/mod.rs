//! Devices that run in the sandboxer and are reached by every hypervisor.
//!
//! A device is split in two: its core works on virtqueues in guest memory and
//! knows nothing about how they got there, and a thin file of glue serves the
//! core to an external VMM over vhost-user. The built-in VMM calls the core
//! directly.

pub mod fs;
pub mod throttle;
pub mod vhost_user;
pub mod vsock;
