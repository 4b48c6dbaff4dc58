//! The system calls that the built-in VMM's threads need, and no others.
//!
//! One filter for each kind of thread, set by the thread itself when it has opened
//! everything it works with. What is not in the list fails with `EPERM`: a bug then
//! shows as an error of the device and not as the end of the pod.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::devices::net::{TUNSETOFFLOAD, TUNSETQUEUE};

/// Whose filter it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Runs guest code.
    Processor,
    /// Moves bytes between queues and descriptors it has.
    Device,
    /// As a device, and sets queues of network interfaces up.
    Network,
    /// As a device, and works with sockets.
    Sockets,
    /// As a device, and talks over a connection it has.
    VhostUser,
}

/// Memory, locks, signals, time, the log, and the end.
const COMMON: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_futex,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mprotect,
    libc::SYS_brk,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

const DEVICE: &[libc::c_long] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_fallocate,
];

/// Besides those of a device.
const MESSAGES: &[libc::c_long] = &[libc::SYS_sendmsg, libc::SYS_recvmsg];

const SOCKETS: &[libc::c_long] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_timerfd_settime,
];

/// `_IO(KVMIO, 0x80)` and `_IO(KVMIO, 0xad)` of include/uapi/linux/kvm.h.
const KVM_RUN: u64 = 0xae80;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;

/// `_IOR(KVMIO, 0x81, struct kvm_regs)` and `_IOR(KVMIO, 0x83, struct kvm_sregs)`, for the
/// message of a processor that cannot go on. They read what the guest knows anyway.
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;

/// Those about a queue of an interface, and the kernel's work on it.
fn network_requests() -> Vec<u64> {
    use vhost::vhost_kern::vhost_binding as vhost;
    vec![
        TUNSETOFFLOAD,
        TUNSETQUEUE,
        vhost::VHOST_SET_FEATURES(),
        vhost::VHOST_SET_VRING_NUM(),
        vhost::VHOST_SET_VRING_BASE(),
        vhost::VHOST_SET_VRING_ADDR(),
        vhost::VHOST_SET_VRING_CALL(),
        vhost::VHOST_SET_VRING_KICK(),
        vhost::VHOST_NET_SET_BACKEND(),
    ]
}

#[derive(Debug, thiserror::Error)]
#[error("seccomp: {0}")]
struct Failed(String);

/// Confines the calling thread.
///
/// # Errors
/// The kernel refuses the filter.
pub fn confine(kind: Kind) -> io::Result<()> {
    let failed = |e: &dyn std::fmt::Display| io::Error::other(Failed(e.to_string()));
    let program: seccompiler::BpfProgram = filter(kind)
        .and_then(TryInto::try_into)
        .map_err(|e| failed(&e))?;
    // Sets no_new_privs as well.
    seccompiler::apply_filter(&program).map_err(|e| failed(&e))
}

fn filter(kind: Kind) -> Result<SeccompFilter, seccompiler::BackendError> {
    let (own, more) = match kind {
        Kind::Processor => (&[][..], &[][..]),
        Kind::Device | Kind::Network => (DEVICE, &[][..]),
        Kind::Sockets => (SOCKETS, &[][..]),
        Kind::VhostUser => (DEVICE, MESSAGES),
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = COMMON
        .iter()
        .chain(own)
        .chain(more)
        .map(|number| (*number, Vec::new()))
        .collect();
    let requests = match kind {
        Kind::Processor => vec![KVM_RUN, KVM_KVMCLOCK_CTRL, KVM_GET_REGS, KVM_GET_SREGS],
        Kind::Network => network_requests(),
        Kind::Device | Kind::Sockets | Kind::VhostUser => Vec::new(),
    };
    if !requests.is_empty() {
        let only = |request| {
            let condition =
                SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, request)?;
            SeccompRule::new(vec![condition])
        };
        let requests = requests.into_iter().map(only).collect::<Result<_, _>>()?;
        rules.insert(libc::SYS_ioctl, requests);
    }
    SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `work` on a thread of its own, confined.
    fn confined<T: Send + 'static>(kind: Kind, work: fn() -> T) -> T {
        let thread = std::thread::spawn(move || {
            confine(kind).unwrap();
            work()
        });
        thread.join().unwrap()
    }

    fn open_is_refused() -> bool {
        let opened = std::fs::File::open("/");
        opened.is_err_and(|e| e.raw_os_error() == Some(libc::EPERM))
    }

    #[test]
    fn no_kind_can_open_files_or_make_processes() {
        let kinds = [
            Kind::Processor,
            Kind::Device,
            Kind::Network,
            Kind::Sockets,
            Kind::VhostUser,
        ];
        for kind in kinds {
            assert!(confined(kind, open_is_refused), "{kind:?}");
            // SAFETY: the call is refused; if it were not, the child would end at once.
            let forked = confined(kind, || unsafe {
                let pid = libc::syscall(libc::SYS_fork);
                if pid == 0 {
                    libc::_exit(0);
                }
                pid
            });
            assert_eq!(forked, -1, "{kind:?}");
        }
        assert!(!open_is_refused(), "other threads still can");
    }

    #[test]
    fn a_processor_has_few_requests_and_no_sockets() {
        const KVM_SET_SREGS: u64 = 0x4138_ae84;
        let errors = confined(Kind::Processor, || {
            [KVM_RUN, KVM_GET_SREGS, KVM_SET_SREGS, 0x5413].map(|number| {
                // SAFETY: a request to a descriptor that does not exist.
                unsafe { libc::ioctl(-1, number) };
                io::Error::last_os_error().raw_os_error()
            })
        });
        let (bad, refused) = (Some(libc::EBADF), Some(libc::EPERM));
        assert_eq!(errors, [bad, bad, refused, refused]);
        let errors = confined(Kind::Network, || {
            [TUNSETQUEUE, KVM_RUN, 0x5413].map(|number| {
                // SAFETY: a request to a descriptor that does not exist.
                unsafe { libc::ioctl(-1, number) };
                io::Error::last_os_error().raw_os_error()
            })
        });
        assert_eq!(errors, [bad, refused, refused]);
        let socket = confined(Kind::Processor, || {
            std::os::unix::net::UnixStream::pair().is_err()
        });
        assert!(socket);
    }
}
