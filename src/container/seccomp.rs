//! The system call filter of config.json, compiled for the guest's kernel, which is
//! of this machine's architecture.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek};

use kuasar_runv_protocol::seccomp::{
    FLAG_LOG, FLAG_SPEC_ALLOW, FLAG_TSYNC, Filter, INSTRUCTION, MAX_INSTRUCTIONS,
};
use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

/// In runc's words where it has some.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("unable to init seccomp: {what}: {source}")]
    Refused { what: String, source: SeccompError },
    #[error("unable to init seccomp: errnoRet {0} is no value for SCMP_ACT_TRACE")]
    Trace(u32),
    #[error("unable to init seccomp: SCMP_ACT_NOTIFY is not supported")]
    Notify,
    #[error(
        "unable to init seccomp: the filter has {0} instructions, the kernel takes {MAX_INSTRUCTIONS}"
    )]
    TooLong(usize),
    #[error("unable to init seccomp: writing the filter: {0}")]
    Write(#[from] io::Error),
}

fn refused(what: impl Into<String>) -> impl FnOnce(SeccompError) -> Error {
    let what = what.into();
    move |source| Error::Refused { what, source }
}

/// Whether there is anything to filter (runc loads no filter otherwise).
#[must_use]
pub fn filters(seccomp: &LinuxSeccomp) -> bool {
    let names_any = seccomp.syscalls().as_ref().is_some_and(|s| !s.is_empty());
    names_any || seccomp.default_action() != LinuxSeccompAction::ScmpActAllow
}

/// Compiles a filter.
///
/// # Errors
/// What libseccomp refuses, and what no kernel takes.
pub fn compile(seccomp: &LinuxSeccomp) -> Result<Filter, Error> {
    let default = action(seccomp.default_action(), seccomp.default_errno_ret())?;
    let mut context = ScmpFilterContext::new(default).map_err(refused("the default action"))?;
    for arch in seccomp.architectures().iter().flatten() {
        let named = arch.to_string().parse();
        named
            .and_then(|arch| context.add_arch(arch).map(drop))
            .map_err(refused(format!("the architecture {arch}")))?;
    }
    for rule in seccomp.syscalls().iter().flatten() {
        let wanted = action(rule.action(), rule.errno_ret())?;
        // Says nothing, and libseccomp would refuse it.
        if wanted != default {
            add(&mut context, rule, wanted)?;
        }
    }
    Ok(Filter {
        flags: flags(seccomp),
        program: export(&context)?,
    })
}

fn add(
    context: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    wanted: ScmpAction,
) -> Result<(), Error> {
    let arguments = rule.args().as_deref().unwrap_or_default();
    let comparisons: Vec<_> = arguments.iter().map(comparison).collect();
    let mut seen = HashSet::new();
    let is_repeated = !arguments
        .iter()
        .all(|argument| seen.insert(argument.index()));
    for name in rule.names() {
        // One that this libseccomp does not know (runc).
        let Ok(call) = ScmpSyscall::from_name(name) else {
            log::debug!("seccomp: there is no system call {name}");
            continue;
        };
        let added = match &comparisons[..] {
            [] => context.add_rule(wanted, call).map(drop),
            // One rule may compare an argument once: each is a rule of its own (runc).
            all if is_repeated => all.iter().try_for_each(|one| {
                let one = std::slice::from_ref(one);
                context.add_rule_conditional(wanted, call, one).map(drop)
            }),
            all => context.add_rule_conditional(wanted, call, all).map(drop),
        };
        added.map_err(refused(format!(
            "error adding seccomp filter rule for syscall {name}"
        )))?;
    }
    Ok(())
}

fn export(context: &ScmpFilterContext) -> Result<Vec<u8>, Error> {
    let file = memfd_create(c"seccomp", MemFdCreateFlag::MFD_CLOEXEC).map_err(io::Error::from)?;
    context
        .export_bpf(&file)
        .map_err(refused("generating the filter"))?;
    let mut file = File::from(file);
    file.rewind()?;
    let mut program = Vec::new();
    file.read_to_end(&mut program)?;
    match program.len() / INSTRUCTION {
        count if count > MAX_INSTRUCTIONS => Err(Error::TooLong(count)),
        _ => Ok(program),
    }
}

fn flags(seccomp: &LinuxSeccomp) -> u32 {
    let flag = |flag: &LinuxSeccompFilterFlag| match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => FLAG_TSYNC,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => FLAG_SPEC_ALLOW,
        // Is about a listener, which there is not.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    };
    let flags = seccomp.flags().iter().flatten();
    flags.map(flag).fold(0, |all, one| all | one)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, Error> {
    let errno = errno.unwrap_or(libc::EPERM.unsigned_abs());
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.cast_signed()),
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(errno.try_into().map_err(|_| Error::Trace(errno))?)
        }
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => return Err(Error::Notify),
    })
}

fn comparison(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    let operator = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => ScmpCompareOp::NotEqual,
        LinuxSeccompOperator::ScmpCmpLt => ScmpCompareOp::Less,
        LinuxSeccompOperator::ScmpCmpLe => ScmpCompareOp::LessOrEqual,
        LinuxSeccompOperator::ScmpCmpEq => ScmpCompareOp::Equal,
        LinuxSeccompOperator::ScmpCmpGe => ScmpCompareOp::GreaterEqual,
        LinuxSeccompOperator::ScmpCmpGt => ScmpCompareOp::Greater,
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            // The mask is `value`, what is compared with is `valueTwo`.
            return ScmpArgCompare::new(
                index(argument),
                ScmpCompareOp::MaskedEqual(argument.value()),
                argument.value_two().unwrap_or(0),
            );
        }
    };
    ScmpArgCompare::new(index(argument), operator, argument.value())
}

/// One that does not fit is refused by libseccomp.
fn index(argument: &LinuxSeccompArg) -> u32 {
    u32::try_from(argument.index()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn profile(json: Value) -> LinuxSeccomp {
        serde_json::from_value(json).unwrap()
    }

    fn program(json: Value) -> Vec<u8> {
        compile(&profile(json)).unwrap().program
    }

    #[test]
    fn every_architecture_has_its_name() {
        for name in [
            "NATIVE",
            "X86",
            "X86_64",
            "X32",
            "ARM",
            "AARCH64",
            "MIPS",
            "MIPS64",
            "MIPS64N32",
            "MIPSEL",
            "MIPSEL64",
            "MIPSEL64N32",
            "PPC",
            "PPC64",
            "PPC64LE",
            "S390",
            "S390X",
            "PARISC",
            "PARISC64",
            "RISCV64",
        ] {
            let name = format!("SCMP_ARCH_{name}");
            let arch: oci_spec::runtime::Arch = serde_json::from_value(json!(name)).unwrap();
            assert!(
                arch.to_string().parse::<libseccomp::ScmpArch>().is_ok(),
                "{name}: {arch}"
            );
        }
        // Those of the profiles of engines.
        let archs = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
        let rule = json!({"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"});
        let one = program(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}));
        let all = program(json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": archs, "syscalls": [rule],
        }));
        assert!(all.len() > one.len());
    }

    #[test]
    fn rules_that_say_nothing_are_left_out() {
        let bare = program(json!({"defaultAction": "SCMP_ACT_ERRNO"}));
        let same = program(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
            {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["no_such_call"], "action": "SCMP_ACT_ALLOW"},
        ]}));
        assert_eq!(bare, same);
    }

    #[test]
    fn one_argument_compared_twice_makes_two_rules() {
        let compared = |index: usize| {
            let args = json!([
                {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
                {"index": index, "value": 2, "op": "SCMP_CMP_EQ"},
            ]);
            let rule = json!({"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": args});
            program(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]}))
        };
        assert_ne!(compared(0), compared(1));
    }

    #[test]
    fn flags_go_along() {
        let flags = json!(["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]);
        let profile = profile(json!({"defaultAction": "SCMP_ACT_ERRNO", "flags": flags}));
        assert_eq!(compile(&profile).unwrap().flags, FLAG_LOG | FLAG_SPEC_ALLOW);
    }

    #[test]
    fn what_cannot_be_compiled_is_an_error() {
        let refused = |json| compile(&profile(json)).unwrap_err().to_string();
        let trace = json!({"defaultAction": "SCMP_ACT_TRACE", "defaultErrnoRet": 65536});
        assert!(refused(trace).contains("65536"));
        let index = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{
            "names": ["mkdir"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}],
        }]});
        assert!(refused(index).contains("error adding seccomp filter rule for syscall mkdir"));
    }

    #[test]
    fn what_filters_nothing_is_no_filter() {
        assert!(!filters(&profile(
            json!({"defaultAction": "SCMP_ACT_ALLOW"})
        )));
        assert!(filters(&profile(
            json!({"defaultAction": "SCMP_ACT_ERRNO"})
        )));
    }
}
