//! Device rules of a container: an eBPF program of type `CGROUP_DEVICE`.
//!
//! cgroup v2 has no device controller with files; a program attached to the
//! cgroup is asked for every open and mknod of a device. It is generated from
//! the spec's rules, of which the last one that speaks about a device and an
//! access decides, as with the files of cgroup v1.
//!
//! The program walks the rules from the last to the first with the accesses that
//! are still undecided in a register: a matching "deny" of one of them ends with
//! no, a matching "allow" takes its accesses out, and none left is a yes. At the
//! end the answer is no.
//!
//! References: Linux Documentation/admin-guide/cgroup-v2.rst, "Device
//! controller"; include/uapi/linux/bpf.h, `struct bpf_cgroup_dev_ctx`.

use std::fs::File;
use std::io;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::Cgroup;
use crate::bpf::{
    self, AND_IMM, EXIT, Insn, JUMP_EQ_IMM, JUMP_NE_IMM, LOAD_WORD, MOVE_IMM, MOVE_REG, R_CONTEXT,
    R_RESULT, SHIFT_RIGHT_IMM, insn,
};

const ACC_MKNOD: u32 = 1;
const ACC_READ: u32 = 2;
const ACC_WRITE: u32 = 4;
const ACC_ALL: u32 = ACC_MKNOD | ACC_READ | ACC_WRITE;

const DEV_BLOCK: u32 = 1;
const DEV_CHAR: u32 = 2;

/// Most rules of one container: the kernel refuses longer programs than 1M
/// instructions, and nobody writes this many.
const MAX_RULES: usize = 4096;

/// One rule, with the spec's wildcards as `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    device_type: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RuleError {
    #[error("device rule has an unknown access '{0}'")]
    Access(char),
    #[error("device rules for this type of device are not supported")]
    Type,
    #[error("device number {0} is out of range")]
    Number(i64),
    #[error("more than {MAX_RULES} device rules")]
    TooMany,
}

/// The rules of a container: the spec's, then the devices every container may
/// use (runc's list: mknod of anything, the standard devices, terminals).
///
/// # Errors
/// A rule that cannot be expressed.
pub fn rules(given: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>, RuleError> {
    if given.len() > MAX_RULES {
        return Err(RuleError::TooMany);
    }
    let mut rules = given.iter().map(from_spec).collect::<Result<Vec<_>, _>>()?;
    for device_type in [DEV_CHAR, DEV_BLOCK] {
        rules.push(Rule {
            allow: true,
            device_type: Some(device_type),
            major: None,
            minor: None,
            access: ACC_MKNOD,
        });
    }
    // null, zero, full, random, urandom, tty, console, ptmx, pts
    let standard = [
        (1, Some(3)),
        (1, Some(5)),
        (1, Some(7)),
        (1, Some(8)),
        (1, Some(9)),
        (5, Some(0)),
        (5, Some(1)),
        (5, Some(2)),
        (136, None),
    ];
    rules.extend(standard.map(|(major, minor)| Rule {
        allow: true,
        device_type: Some(DEV_CHAR),
        major: Some(major),
        minor,
        access: ACC_ALL,
    }));
    Ok(rules)
}

fn from_spec(rule: &LinuxDeviceCgroup) -> Result<Rule, RuleError> {
    let device_type = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(DEV_BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(DEV_CHAR),
        Some(LinuxDeviceType::P) => return Err(RuleError::Type),
    };
    let number = |n: Option<i64>| match n {
        // Negative is the wildcard of engines that fill in every field.
        None => Ok(None),
        Some(n) if n < 0 => Ok(None),
        Some(n) => u32::try_from(n).map(Some).map_err(|_| RuleError::Number(n)),
    };
    let access = match rule.access().as_deref() {
        None | Some("") => ACC_ALL,
        Some(letters) => letters.chars().try_fold(0, |bits, c| match c {
            'r' => Ok(bits | ACC_READ),
            'w' => Ok(bits | ACC_WRITE),
            'm' => Ok(bits | ACC_MKNOD),
            other => Err(RuleError::Access(other)),
        })?,
    };
    Ok(Rule {
        allow: rule.allow(),
        device_type,
        major: number(rule.major())?,
        minor: number(rule.minor())?,
        access,
    })
}

/// Confines the devices of a cgroup.
///
/// # Errors
/// Of bpf(2): a kernel without `CONFIG_CGROUP_BPF`.
pub fn attach(cgroup: &Cgroup, rules: &[Rule]) -> io::Result<()> {
    let program = bpf::load(bpf::CGROUP_DEVICE, &program(rules))?;
    let dir = File::open(cgroup.path())?;
    bpf::attach(bpf::CGROUP_DEVICE, &program, &dir)
}

const R_TYPE: u8 = 2;
/// Accesses asked for and not decided yet.
const R_ACCESS: u8 = 3;
const R_MAJOR: u8 = 4;
const R_MINOR: u8 = 5;
const R_SCRATCH: u8 = 6;

fn program(rules: &[Rule]) -> Vec<Insn> {
    let mut program = vec![
        // access_type: the type in the low half, the access in the high one
        insn(LOAD_WORD, R_TYPE, R_CONTEXT, 0, 0),
        insn(MOVE_REG, R_ACCESS, R_TYPE, 0, 0),
        insn(AND_IMM, R_TYPE, 0, 0, 0xffff),
        insn(SHIFT_RIGHT_IMM, R_ACCESS, 0, 0, 16),
        insn(LOAD_WORD, R_MAJOR, R_CONTEXT, 4, 0),
        insn(LOAD_WORD, R_MINOR, R_CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        add_rule(&mut program, rule);
    }
    program.extend(answer(false));
    program
}

/// Length of the program that the rules make, in instructions.
#[cfg(any(test, fuzzing))]
pub(crate) fn program_len(rules: &[Rule]) -> usize {
    program(rules).len()
}

fn answer(allow: bool) -> [Insn; 2] {
    [
        insn(MOVE_IMM, R_RESULT, 0, 0, u32::from(allow)),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

fn add_rule(program: &mut Vec<Insn>, rule: &Rule) {
    let mut verdict = Vec::new();
    if rule.allow {
        verdict.push(insn(AND_IMM, R_ACCESS, 0, 0, !rule.access));
        verdict.push(insn(JUMP_NE_IMM, R_ACCESS, 0, 2, 0));
    } else {
        verdict.push(insn(MOVE_REG, R_SCRATCH, R_ACCESS, 0, 0));
        verdict.push(insn(AND_IMM, R_SCRATCH, 0, 0, rule.access));
        verdict.push(insn(JUMP_EQ_IMM, R_SCRATCH, 0, 2, 0));
    }
    verdict.extend(answer(rule.allow));
    let conditions: Vec<(u8, u32)> = [
        (R_TYPE, rule.device_type),
        (R_MAJOR, rule.major),
        (R_MINOR, rule.minor),
    ]
    .into_iter()
    .filter_map(|(register, value)| Some((register, value?)))
    .collect();
    for (i, (register, value)) in conditions.iter().enumerate() {
        // A rule has less than ten instructions.
        let past_rule = (conditions.len() - 1 - i + verdict.len()) as i16;
        program.push(insn(JUMP_NE_IMM, *register, 0, past_rule, *value));
    }
    program.extend(verdict);
}

#[cfg(test)]
mod tests;
