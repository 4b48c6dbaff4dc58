//! Hypervisors behind one trait, and the devices they share.
pub mod devices;
