//! Small programs for the kernel (bpf(2)), written instruction by instruction and
//! attached to cgroups.
//!
//! References: include/uapi/linux/bpf.h; Documentation/bpf/standardization/
//! instruction-set.rst.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

use crate::sys;

/// `struct bpf_insn`; registers are 4 bits each, destination low.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Insn {
    pub code: u8,
    pub regs: u8,
    pub off: i16,
    pub imm: i32,
}

pub const LOAD_WORD: u8 = 0x61;
pub const STORE_WORD: u8 = 0x63;
pub const STORE_LONG_IMM: u8 = 0x7a;
pub const LOAD_LONG_IMM: u8 = 0x18;
pub const AND_IMM: u8 = 0x54;
pub const SHIFT_RIGHT_IMM: u8 = 0x74;
pub const MOVE_IMM: u8 = 0xb4;
pub const MOVE_REG: u8 = 0xbc;
pub const MOVE_LONG_REG: u8 = 0xbf;
pub const ADD_LONG_IMM: u8 = 0x07;
pub const JUMP_NE_IMM: u8 = 0x56;
pub const JUMP_EQ_IMM: u8 = 0x16;
pub const JUMP_LONG_NE_REG: u8 = 0x5d;
pub const JUMP: u8 = 0x05;
pub const CALL: u8 = 0x85;
pub const EXIT: u8 = 0x95;

/// Register of the result, of functions too.
pub const R_RESULT: u8 = 0;
/// First argument, of functions too: what the program is asked about.
pub const R_CONTEXT: u8 = 1;
/// Points behind 512 bytes of stack.
pub const R_FRAME: u8 = 10;

/// Functions of the kernel.
pub const FN_SOCK_OPS_CB_FLAGS_SET: u32 = 59;
pub const FN_GET_NETNS_COOKIE: u32 = 122;
pub const FN_RINGBUF_OUTPUT: u32 = 130;

/// In the place of a source register of [`LOAD_LONG_IMM`]: the number is the
/// descriptor of a map.
const MAP_DESCRIPTOR: u8 = 1;

#[must_use]
pub fn insn(code: u8, dst: u8, src: u8, off: i16, imm: u32) -> Insn {
    Insn {
        code,
        regs: src << 4 | dst,
        off,
        // The kernel compares 32 bits, whatever the sign.
        imm: imm as i32,
    }
}

/// Loads 64 bits, which takes two instructions.
#[must_use]
pub fn load_long(dst: u8, value: u64) -> [Insn; 2] {
    [
        insn(LOAD_LONG_IMM, dst, 0, 0, value as u32),
        insn(0, 0, 0, 0, (value >> 32) as u32),
    ]
}

/// Loads the address of a map.
#[must_use]
pub fn load_map(dst: u8, map: RawFd) -> [Insn; 2] {
    [
        insn(LOAD_LONG_IMM, dst, MAP_DESCRIPTOR, 0, map as u32),
        insn(0, 0, 0, 0, 0),
    ]
}

/// What a program is asked about, as program type and attach type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    program: u32,
    attach: u32,
}

const fn hook(program: u32, attach: u32) -> Hook {
    Hook { program, attach }
}

pub const CGROUP_DEVICE: Hook = hook(15, 6);
pub const SOCK_OPS: Hook = hook(13, 3);
pub const INET4_POST_BIND: Hook = hook(9, 12);
pub const INET6_POST_BIND: Hook = hook(9, 13);
pub const INET_SOCK_RELEASE: Hook = hook(9, 34);
pub const INET4_CONNECT: Hook = hook(18, 10);
pub const INET6_CONNECT: Hook = hook(18, 11);
pub const UDP4_SENDMSG: Hook = hook(18, 14);
pub const UDP4_RECVMSG: Hook = hook(18, 19);
pub const UDP6_RECVMSG: Hook = hook(18, 20);
pub const INET4_GETPEERNAME: Hook = hook(18, 29);
pub const INET6_GETPEERNAME: Hook = hook(18, 30);

const MAP_CREATE: libc::c_int = 0;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_RINGBUF: u32 = 27;
const ALLOW_MULTI: u32 = 2;

#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct AttachAttr {
    target_fd: RawFd,
    attach_bpf_fd: RawFd,
    attach_type: u32,
    attach_flags: u32,
}

#[repr(C)]
struct LinkAttr {
    prog_fd: RawFd,
    target_fd: RawFd,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct MapAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// # Safety
/// `attr` must be what the kernel reads for `command`, with valid pointers.
unsafe fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<RawFd> {
    // SAFETY: the caller's promise; the size is that of the value.
    let result = sys::check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            std::mem::size_of::<T>(),
        )
    })?;
    Ok(result as RawFd)
}

/// Has the kernel check a program.
///
/// # Errors
/// Of bpf(2): a kernel without `CONFIG_CGROUP_BPF`.
pub fn load(hook: Hook, program: &[Insn]) -> io::Result<OwnedFd> {
    let attr = LoadAttr {
        prog_type: hook.program,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: [0; 16],
        prog_ifindex: 0,
        expected_attach_type: hook.attach,
    };
    // SAFETY: attr is the kernel's layout for this command and its pointers
    // outlive the call.
    let fd = unsafe { bpf(PROG_LOAD, &attr)? };
    // SAFETY: just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a program to a cgroup for as long as that exists.
///
/// # Errors
/// Of bpf(2).
pub fn attach(hook: Hook, program: &OwnedFd, cgroup: &impl AsRawFd) -> io::Result<()> {
    let attr = AttachAttr {
        target_fd: cgroup.as_raw_fd(),
        attach_bpf_fd: program.as_raw_fd(),
        attach_type: hook.attach,
        attach_flags: ALLOW_MULTI,
    };
    // SAFETY: attr is the kernel's layout for this command.
    unsafe { bpf(PROG_ATTACH, &attr)? };
    Ok(())
}

/// Attaches a program to a cgroup for as long as the result is open.
///
/// # Errors
/// Of bpf(2).
pub fn link(hook: Hook, program: &OwnedFd, cgroup: &impl AsRawFd) -> io::Result<OwnedFd> {
    let attr = LinkAttr {
        prog_fd: program.as_raw_fd(),
        target_fd: cgroup.as_raw_fd(),
        attach_type: hook.attach,
        flags: 0,
    };
    // SAFETY: attr is the kernel's layout for this command.
    let fd = unsafe { bpf(LINK_CREATE, &attr)? };
    // SAFETY: just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A ring buffer of one page, of which only matters whether something has been put
/// into it (Documentation/bpf/ringbuf.rst).
pub struct Signal {
    map: OwnedFd,
    /// Where the reader is, which is the reader's to write.
    consumer: Page,
    /// Where the writers are.
    producer: Page,
}

struct Page(*mut libc::c_void);

// SAFETY: the mapping belongs to nobody else, and is accessed atomically.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

const PAGE_SIZE: usize = 4096;

impl Signal {
    /// # Errors
    /// Of bpf(2) and mmap(2).
    pub fn new() -> io::Result<Signal> {
        let attr = MapAttr {
            map_type: MAP_TYPE_RINGBUF,
            key_size: 0,
            value_size: 0,
            max_entries: PAGE_SIZE as u32,
        };
        // SAFETY: attr is the kernel's layout for this command.
        let fd = unsafe { bpf(MAP_CREATE, &attr)? };
        // SAFETY: just made for us.
        let map = unsafe { OwnedFd::from_raw_fd(fd) };
        let consumer = Page::map(&map, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        let producer = Page::map(&map, libc::PROT_READ, PAGE_SIZE)?;
        Ok(Signal {
            map,
            consumer,
            producer,
        })
    }

    /// The map, readable when there is something in it.
    #[must_use]
    pub fn fd(&self) -> &OwnedFd {
        &self.map
    }

    /// Takes out what is there.
    pub fn reset(&self) {
        let written = self.producer.position().load(Acquire);
        self.consumer.position().store(written, Release);
    }
}

impl Page {
    fn map(map: &OwnedFd, protection: libc::c_int, offset: usize) -> io::Result<Page> {
        // SAFETY: a new mapping where the kernel wants it.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE,
                protection,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Page(page))
    }

    /// An unsigned long at the start of the page.
    fn position(&self) -> &AtomicU64 {
        // SAFETY: the page is mapped while this value lives and is aligned; only the
        // consumer's, which is writable, is written to.
        unsafe { &*self.0.cast::<AtomicU64>() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nothing refers to it any more.
        unsafe { libc::munmap(self.0, PAGE_SIZE) };
    }
}

#[cfg(test)]
pub mod machine {
    //! What the kernel would do with a program, as far as the programs here need it.

    use super::*;

    /// Address of the context; no other can be loaded from.
    const CONTEXT: u64 = 0xc0_0000_0000;
    /// Of registers that hold nothing.
    const NOTHING: u64 = 0xdead_dead_dead_dead;
    /// Registers of arguments, which a call does not preserve.
    const ARGUMENTS: std::ops::RangeInclusive<usize> = 1..=5;

    /// Runs a program about `context` in a network namespace with this cookie; the result.
    pub fn run(program: &[Insn], context: &mut [u32], cookie: u64) -> u64 {
        let mut regs = [NOTHING; 11];
        regs[usize::from(R_CONTEXT)] = CONTEXT;
        let mut pc = 0;
        loop {
            let Insn {
                code,
                regs: r,
                off,
                imm,
            } = program[pc];
            let (dst, src) = (usize::from(r & 15), usize::from(r >> 4));
            let (place, imm) = (usize::try_from(off).unwrap() / 4, imm as u32);
            pc += 1;
            let mut jump = |taken: bool| pc += if taken { off as usize } else { 0 };
            // Those of 32 bits clear the others.
            match code {
                LOAD_WORD => {
                    assert_eq!(regs[src], CONTEXT);
                    regs[dst] = context[place].into();
                }
                STORE_WORD => {
                    assert_eq!(regs[dst], CONTEXT);
                    context[place] = regs[src] as u32;
                }
                LOAD_LONG_IMM => {
                    regs[dst] = u64::from(program[pc].imm as u32) << 32 | u64::from(imm);
                    pc += 1;
                }
                AND_IMM => regs[dst] = (regs[dst] as u32 & imm).into(),
                SHIFT_RIGHT_IMM => regs[dst] = (regs[dst] as u32 >> imm).into(),
                MOVE_IMM => regs[dst] = imm.into(),
                MOVE_REG => regs[dst] = (regs[src] as u32).into(),
                MOVE_LONG_REG => regs[dst] = regs[src],
                JUMP_NE_IMM => jump(regs[dst] as u32 != imm),
                JUMP_EQ_IMM => jump(regs[dst] as u32 == imm),
                JUMP_LONG_NE_REG => jump(regs[dst] != regs[src]),
                CALL => {
                    assert_eq!(imm, FN_GET_NETNS_COOKIE);
                    assert_eq!(regs[usize::from(R_CONTEXT)], CONTEXT);
                    regs[ARGUMENTS].fill(NOTHING);
                    regs[usize::from(R_RESULT)] = cookie;
                }
                EXIT => return regs[usize::from(R_RESULT)],
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }
}
