//! Thin, safe wrappers of the kernel interfaces the runtime is built on. No
//! policy here.

pub mod atomic_file;
pub mod capabilities;
pub mod inherited;
pub mod interrupt;
pub mod lock;
pub mod mount;
pub mod namespace;
pub mod own_binary;
pub mod process;
pub mod random;
pub mod seqpacket;
pub mod trim;
pub mod unix_socket;
pub mod wake;
