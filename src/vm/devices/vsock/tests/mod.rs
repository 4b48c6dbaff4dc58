//! Tests of the device against a driver that does what it is told.

mod connect;
mod guest;
mod hostile;
mod streams;
