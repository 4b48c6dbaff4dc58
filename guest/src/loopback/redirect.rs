//! Leading a container's datagrams and connections for one address to another port,
//! and back: programs that the kernel asks at connect(2), sendto(2), recvfrom(2) and
//! getpeername(2) (BPF_PROG_TYPE_CGROUP_SOCK_ADDR).
//!
//! A name server is expected at port 53; but a container may want to listen on port 53
//! of all its addresses, so nobody else can have that of any of them.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use super::root_cgroup;
use crate::bpf::{
    self, CALL, EXIT, FN_GET_NETNS_COOKIE, Hook, Insn, JUMP_LONG_NE_REG, JUMP_NE_IMM, LOAD_WORD,
    MOVE_IMM, MOVE_LONG_REG, R_CONTEXT, R_RESULT, STORE_WORD, insn, load_long,
};

/// Which port of which address in which network namespace is led to which.
#[derive(Debug, Clone, Copy)]
pub struct Redirect {
    pub address: Ipv4Addr,
    pub from: u16,
    pub to: u16,
    /// `SO_NETNS_COOKIE` of the namespace's sockets.
    pub namespace: u64,
}

impl Redirect {
    /// Redirects while the result exists.
    ///
    /// # Errors
    /// Of bpf(2).
    pub fn establish(self) -> io::Result<Vec<OwnedFd>> {
        let cgroup = root_cgroup()?;
        let there = self.program(self.from, self.to);
        let back = self.program(self.to, self.from);
        let hooks: [(Hook, &[Insn]); 4] = [
            (bpf::INET4_CONNECT, &there),
            (bpf::UDP4_SENDMSG, &there),
            (bpf::UDP4_RECVMSG, &back),
            (bpf::INET4_GETPEERNAME, &back),
        ];
        let links = hooks.into_iter().map(|(hook, program)| {
            let program = bpf::load(hook, program)?;
            bpf::link(hook, &program, &cgroup)
        });
        links.collect()
    }

    /// `struct bpf_sock_addr` has the address and the port, in network byte order, at
    /// these places.
    fn program(&self, from: u16, to: u16) -> Vec<Insn> {
        const ADDRESS: i16 = 4;
        const PORT: i16 = 24;
        const R_SELF: u8 = 6;
        const R_VALUE: u8 = 2;
        let address = u32::from_ne_bytes(self.address.octets());
        let ports = [from, to].map(|port| u32::from(port.to_be()));
        let mut program = vec![
            insn(MOVE_LONG_REG, R_SELF, R_CONTEXT, 0, 0),
            insn(LOAD_WORD, R_VALUE, R_SELF, ADDRESS, 0),
            insn(JUMP_NE_IMM, R_VALUE, 0, 9, address),
            insn(LOAD_WORD, R_VALUE, R_SELF, PORT, 0),
            insn(JUMP_NE_IMM, R_VALUE, 0, 7, ports[0]),
            insn(MOVE_LONG_REG, R_CONTEXT, R_SELF, 0, 0),
            insn(CALL, 0, 0, 0, FN_GET_NETNS_COOKIE),
        ];
        program.extend(load_long(R_VALUE, self.namespace));
        program.extend([
            insn(JUMP_LONG_NE_REG, R_RESULT, R_VALUE, 2, 0),
            insn(MOVE_IMM, R_VALUE, 0, 0, ports[1]),
            insn(STORE_WORD, R_SELF, R_VALUE, PORT, 0),
            // Never a no.
            insn(MOVE_IMM, R_RESULT, 0, 0, 1),
            insn(EXIT, 0, 0, 0, 0),
        ]);
        program
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REDIRECT: Redirect = Redirect {
        address: Ipv4Addr::new(127, 0, 0, 11),
        from: 53,
        to: 40_000,
        namespace: 0x1_0000_0007,
    };

    /// The port after the program has been asked.
    fn run(program: &[Insn], address: Ipv4Addr, port: u16, namespace: u64) -> u16 {
        let mut context = [0; 10];
        context[1] = u32::from_ne_bytes(address.octets());
        context[6] = port.to_be().into();
        let allowed = bpf::machine::run(program, &mut context, namespace);
        assert_eq!(allowed, 1, "the kernel would refuse");
        u16::from_be(context[6] as u16)
    }

    #[test]
    fn only_the_named_port_of_the_namespace_is_led_elsewhere() {
        let there = REDIRECT.program(53, 40_000);
        let address = REDIRECT.address;
        assert_eq!(run(&there, address, 53, REDIRECT.namespace), 40_000);
        assert_eq!(run(&there, address, 54, REDIRECT.namespace), 54);
        assert_eq!(run(&there, address, 53, 7), 53);
        let other = Ipv4Addr::new(127, 0, 0, 12);
        assert_eq!(run(&there, other, 53, REDIRECT.namespace), 53);
        let back = REDIRECT.program(40_000, 53);
        assert_eq!(run(&back, address, 40_000, REDIRECT.namespace), 53);
    }
}
