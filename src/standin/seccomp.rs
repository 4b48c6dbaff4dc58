//! The system calls a stand-in needs once it relays, and no others.
//!
//! The list is a table of numbers and the filter is made from it on the stack:
//! a library for it would cost more memory than the rest of the stand-in.
//! What is not in the list fails with `EPERM`.

use std::io;
use std::mem::offset_of;

use libc::{
    BPF_ABS, BPF_JEQ, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, seccomp_data, sock_filter,
};

/// Moving bytes, waiting, memory, ending. No file can be opened, no process made
/// or traced, no socket made, no signal sent but to itself.
const ALLOWED: [libc::c_long; 46] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pwritev2,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_vmsplice,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_prlimit64,
    libc::SYS_setrlimit,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// `AUDIT_ARCH_X86_64` of include/uapi/linux/audit.h.
const ARCH: u32 = 0xC000_003E;

/// Instructions before and behind the table.
const LEN: usize = 4 + ALLOWED.len() + 8;

/// Confines the calling thread, which must have set no_new_privs.
///
/// # Errors
/// As prctl(2).
pub fn confine() -> io::Result<()> {
    let filter = filter(std::process::id());
    let program = libc::sock_fprog {
        // Far below the maximum of 4096.
        len: LEN as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program and its instructions outlive the call, which copies them.
    let set = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn filter(own_pid: u32) -> [sock_filter; LEN] {
    let deny = SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
    let mut program = [ret(deny); LEN];
    let mut at = 0;
    let mut push = |instruction| {
        program[at] = instruction;
        at += 1;
    };
    push(load(offset_of!(seccomp_data, arch)));
    push(equal(ARCH, 1, 0));
    push(ret(SECCOMP_RET_KILL_PROCESS));
    push(load(offset_of!(seccomp_data, nr)));
    for (index, number) in ALLOWED.iter().enumerate() {
        // To the last instruction, over the rest of the table and what follows it.
        push(equal(call(*number), jump(ALLOWED.len() - index + 6), 0));
    }
    // Memory, but none that can be executed. The low halves of the arguments are
    // all that the kernel looks at here.
    push(equal(call(libc::SYS_mmap), 0, 2));
    push(load(argument(2)));
    push(any_of(libc::PROT_EXEC.unsigned_abs(), 3, 4));
    // A signal, but only to itself.
    push(equal(call(libc::SYS_tgkill), 0, 2));
    push(load(argument(0)));
    push(equal(own_pid, 1, 0));
    push(ret(deny));
    push(ret(SECCOMP_RET_ALLOW));
    program
}

/// Offset of the low half of an argument (little endian).
const fn argument(index: usize) -> usize {
    offset_of!(seccomp_data, args) + 8 * index
}

fn call(number: libc::c_long) -> u32 {
    // Numbers of system calls are small and positive.
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn jump(instructions: usize) -> u8 {
    // The table has fewer than 255 entries.
    u8::try_from(instructions).unwrap_or(u8::MAX)
}

fn load(offset: usize) -> sock_filter {
    // `struct seccomp_data` has 64 bytes.
    instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset as u32)
}

fn equal(value: u32, yes: u8, no: u8) -> sock_filter {
    instruction(BPF_JMP | BPF_JEQ | BPF_K, yes, no, value)
}

fn any_of(bits: u32, yes: u8, no: u8) -> sock_filter {
    instruction(BPF_JMP | BPF_JSET | BPF_K, yes, no, bits)
}

const fn ret(value: u32) -> sock_filter {
    instruction(BPF_RET | BPF_K, 0, 0, value)
}

const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter {
        // Codes of BPF have 16 bits.
        code: code as u16,
        jt,
        jf,
        k,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each of the calls answers once the thread is confined.
    fn answers() -> Vec<(&'static str, Option<i32>)> {
        let error = |rc: i64| (rc < 0).then(|| io::Error::last_os_error().raw_os_error());
        let mut answers = Vec::new();
        // SAFETY: system calls on integers and constants.
        unsafe {
            let mut note = |what, rc: i64| answers.push((what, error(rc).flatten()));
            let path = c"/dev/null".as_ptr();
            note("open", libc::open(path, libc::O_RDONLY).into());
            note("fork", libc::fork().into());
            note(
                "socket",
                libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0).into(),
            );
            note("kill", libc::kill(1, 0).into());
            let (pid, thread) = (libc::getpid(), libc::gettid());
            note("another", libc::syscall(libc::SYS_tgkill, 1, 1, 0));
            note("itself", libc::syscall(libc::SYS_tgkill, pid, thread, 0));
            let map = |protection| {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) as i64
            };
            note("memory", map(libc::PROT_READ | libc::PROT_WRITE));
            note("code", map(libc::PROT_READ | libc::PROT_EXEC));
        }
        answers
    }

    #[test]
    fn only_what_a_relay_needs_is_left() {
        let answers = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            confine().unwrap();
            answers()
        });
        let denied = Some(libc::EPERM);
        let expected = [
            ("open", denied),
            ("fork", denied),
            ("socket", denied),
            ("kill", denied),
            ("another", denied),
            ("itself", None),
            ("memory", None),
            ("code", denied),
        ];
        assert_eq!(answers.join().unwrap(), expected);
    }
}
