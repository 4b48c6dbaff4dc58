//! Entry points for fuzz targets of machines and devices, see [`crate::fuzzing`].

pub use super::builtin::fuzzing::registers;
