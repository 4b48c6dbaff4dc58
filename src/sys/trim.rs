//! Giving back what only the start needed.
//!
//! The kernel maps file pages in blocks of 64 KiB around each one that is
//! touched, so that after its start a process of this binary maps most of it.
//! A stand-in waits for hours in one small loop, and the sandboxer of an idle pod does
//! nothing either: they drop all those mappings, and what runs again brings back the few
//! it uses.

use std::ptr;

unsafe extern "C" {
    /// First byte of the binary in memory, defined by the linker.
    static __executable_start: u8;
    /// End of the code, defined by the linker (end(3)).
    static etext: u8;
}

/// Gives back what was allocated and freed.
pub fn heap() {
    // SAFETY: takes an integer, and only touches what is free. That there was nothing
    // to give back is no failure.
    let _ = unsafe { libc::malloc_trim(0) };
}

/// Unmaps the pages of the binary's code and constants.
pub fn code_and_constants() {
    // SAFETY: asks the C library for a constant.
    let Ok(page) = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }) else {
        return;
    };
    let start = ptr::addr_of!(__executable_start).addr() & !(page - 1);
    // Constants that were relocated, and data, lie behind the code.
    let end = ptr::addr_of!(etext).addr() & !(page - 1);
    // SAFETY: the range holds only unmodified private pages of a file; dropped,
    // they are read again from there when they are next used.
    let dropped = unsafe {
        libc::madvise(
            ptr::without_provenance_mut(start),
            end - start,
            libc::MADV_DONTNEED,
        )
    };
    // Nothing depends on it but the size.
    let _ = dropped;
}
