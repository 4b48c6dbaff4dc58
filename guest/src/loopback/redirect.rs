//! Leading a container's datagrams and connections for one address to another port,
//! and back: programs that the kernel asks at connect(2), sendto(2), recvfrom(2) and
//! getpeername(2) (BPF_PROG_TYPE_CGROUP_SOCK_ADDR).
//!
//! A name server is expected at port 53; but a container may want to listen on port 53
//! of all its addresses, so nobody else can have that of any of them.
//!
//! A socket of IPv6 gets there by the mapped address (RFC 4291, section 2.5.5.2). At
//! sendto(2) the kernel then asks as for one of IPv4, and otherwise as for IPv6.

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

/// Of what a program is asked about.
#[derive(Debug, Clone, Copy)]
enum Family {
    V4,
    V6,
}

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Redirect {
    /// Redirects while the result exists.
    ///
    /// # Errors
    /// Of bpf(2).
    pub fn establish(self) -> io::Result<Vec<OwnedFd>> {
        let cgroup = root_cgroup()?;
        let [there, there6] = FAMILIES.map(|family| self.program(family, self.from, self.to));
        let [back, back6] = FAMILIES.map(|family| self.program(family, self.to, self.from));
        let hooks: [(Hook, &[Insn]); 7] = [
            (bpf::INET4_CONNECT, &there),
            (bpf::UDP4_SENDMSG, &there),
            (bpf::UDP4_RECVMSG, &back),
            (bpf::INET4_GETPEERNAME, &back),
            (bpf::INET6_CONNECT, &there6),
            (bpf::UDP6_RECVMSG, &back6),
            (bpf::INET6_GETPEERNAME, &back6),
        ];
        let links = hooks.into_iter().map(|(hook, program)| {
            let program = bpf::load(hook, program)?;
            bpf::link(hook, &program, &cgroup)
        });
        links.collect()
    }

    /// `struct bpf_sock_addr` has the addresses and the port, in network byte order, at
    /// these places.
    fn program(&self, family: Family, from: u16, to: u16) -> Vec<Insn> {
        const ADDRESS: i16 = 4;
        const ADDRESS6: i16 = 8;
        const PORT: i16 = 24;
        const R_SELF: u8 = 6;
        const R_VALUE: u8 = 2;
        /// Instructions behind the comparison of the port, up to those that end it.
        const REST: i16 = 7;
        let address = u32::from_ne_bytes(self.address.octets());
        let ports = [from, to].map(|port| u32::from(port.to_be()));
        let mut compared = match family {
            Family::V4 => vec![(ADDRESS, address)],
            Family::V6 => vec![
                (ADDRESS6, 0),
                (ADDRESS6 + 4, 0),
                (ADDRESS6 + 8, 0xffff_u32.to_be()),
                (ADDRESS6 + 12, address),
            ],
        };
        compared.push((PORT, ports[0]));
        let mut program = vec![insn(MOVE_LONG_REG, R_SELF, R_CONTEXT, 0, 0)];
        for (left, (place, value)) in (0..compared.len() as i16).rev().zip(compared) {
            program.extend([
                insn(LOAD_WORD, R_VALUE, R_SELF, place, 0),
                insn(JUMP_NE_IMM, R_VALUE, 0, 2 * left + REST, value),
            ]);
        }
        program.extend([
            insn(MOVE_LONG_REG, R_CONTEXT, R_SELF, 0, 0),
            insn(CALL, 0, 0, 0, FN_GET_NETNS_COOKIE),
        ]);
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
    use std::net::IpAddr;

    const REDIRECT: Redirect = Redirect {
        address: Ipv4Addr::new(127, 0, 0, 11),
        from: 53,
        to: 40_000,
        namespace: 0x1_0000_0007,
    };

    /// The port after the program has been asked.
    fn run(program: &[Insn], address: IpAddr, port: u16, namespace: u64) -> u16 {
        let mut context = [0; 10];
        match address {
            IpAddr::V4(address) => context[1] = u32::from_ne_bytes(address.octets()),
            IpAddr::V6(address) => {
                for (word, bytes) in context[2..].iter_mut().zip(address.octets().chunks(4)) {
                    *word = u32::from_ne_bytes(bytes.try_into().unwrap());
                }
            }
        }
        context[6] = port.to_be().into();
        let allowed = bpf::machine::run(program, &mut context, namespace);
        assert_eq!(allowed, 1, "the kernel would refuse");
        u16::from_be(context[6] as u16)
    }

    #[test]
    fn only_the_named_port_of_the_namespace_is_led_elsewhere() {
        let ours = REDIRECT.namespace;
        for (family, address, others) in [
            (Family::V4, "127.0.0.11", vec!["127.0.0.12"]),
            (
                Family::V6,
                "::ffff:127.0.0.11",
                vec![
                    "::ffff:127.0.0.12",
                    "::127.0.0.11",
                    "1::ffff:127.0.0.11",
                    "::1:0:ffff:7f00:b",
                ],
            ),
        ] {
            let there = REDIRECT.program(family, 53, 40_000);
            let address = address.parse().unwrap();
            assert_eq!(run(&there, address, 53, ours), 40_000);
            assert_eq!(run(&there, address, 54, ours), 54);
            assert_eq!(run(&there, address, 53, 7), 53);
            for other in others {
                assert_eq!(run(&there, other.parse().unwrap(), 53, ours), 53, "{other}");
            }
            let back = REDIRECT.program(family, 40_000, 53);
            assert_eq!(run(&back, address, 40_000, ours), 53);
        }
    }
}
