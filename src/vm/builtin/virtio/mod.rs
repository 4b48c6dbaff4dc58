//! Virtio devices over MMIO, and what works in them.
//!
//! - [`config`]: a device's configuration space
//! - [`page`]: what a driver reads, as memory
//! - [`registers`]: what a driver reads and writes
//! - [`rings`]: the queues, between registers and worker
//! - [`saved`]: what is saved of a device
//! - [`worker`]: the thread of a device

pub mod config;
pub mod page;
pub mod registers;
pub mod rings;
pub mod saved;
pub mod worker;
