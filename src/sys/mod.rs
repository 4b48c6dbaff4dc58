//! Thin layers over system calls that several modules need.
pub mod unix_socket;
