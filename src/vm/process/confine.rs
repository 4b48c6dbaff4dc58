//! What a child gives up between fork and exec. Only async-signal-safe calls.

use std::ffi::c_int;

use crate::sys::mount;

/// Negative when it failed, with the reason in errno.
///
/// # Safety
/// Only in the child of a fork.
pub(super) unsafe fn make_file_systems_read_only() -> c_int {
    let (none, root) = (std::ptr::null(), c"/".as_ptr());
    // SAFETY: system calls on constants.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) < 0
            || libc::mount(
                none,
                root,
                none,
                // What the host unmounts must not live on here: network namespaces
                // end with their mounts.
                libc::MS_REC | libc::MS_SLAVE,
                none.cast(),
            ) < 0
        {
            return -1;
        }
        let done = libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            root,
            libc::AT_RECURSIVE,
            &raw const mount::READ_ONLY,
            size_of::<mount::MountAttr>(),
        );
        if done < 0 { -1 } else { 0 }
    }
}

/// Default actions and an empty mask, whatever the parent uses.
///
/// # Safety
/// Only in the child of a fork.
pub(super) unsafe fn reset_signals() {
    // SAFETY: async-signal-safe calls on local memory. Numbers that cannot be
    // changed (SIGKILL, SIGSTOP, those of the C library) fail without effect.
    unsafe {
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// `struct __user_cap_header_struct` and `__user_cap_data_struct` of capget(2).
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: c_int,
}
#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}
/// `_LINUX_CAPABILITY_VERSION_3`.
const CAP_VERSION: u32 = 0x2008_0522;
const CAP_COUNT: libc::c_ulong = 64;

/// Leaves no capability to the program that is executed next; those that are in
/// effect now may still be needed to reach it. Without the right to do so there
/// is little to give up.
///
/// # Safety
/// Only in the child of a fork.
pub(super) unsafe fn drop_privileges() {
    // SAFETY: system calls on local memory of the layout they document.
    unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        );
        for capability in 0..CAP_COUNT {
            libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
        }
        let header = CapHeader {
            version: CAP_VERSION,
            pid: 0,
        };
        let mut data = [CapData {
            effective: 0,
            permitted: 0,
            inheritable: 0,
        }; 2];
        if libc::syscall(libc::SYS_capget, &raw const header, &raw mut data) == 0 {
            for set in &mut data {
                set.inheritable = 0;
            }
            libc::syscall(libc::SYS_capset, &raw const header, &raw const data);
        }
    }
}
