//! Tests of the device against a driver that does what it is told.

#[cfg(test)]
mod connect;
#[cfg_attr(fuzzing, allow(dead_code, reason = "more is for tests"))]
pub mod guest;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod streams;
