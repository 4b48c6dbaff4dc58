//! Which hypervisor would run a VM, how, and why.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::guest::unusable;
use super::{Finding, Level, Subject};
use crate::config::Accel;
use crate::root::Root;
use crate::sys::seqpacket::wait_readable;
use crate::vm::detect::{self, KvmStatus};
use crate::vm::requirements;
use crate::vm::selection::{self, Choice};

/// How long `qemu --version` may take.
const VERSION_DEADLINE: Duration = Duration::from_secs(5);
/// The oldest QEMU the project is tested with.
const OLDEST: (u32, u32) = (7, 2);

const KVM_REMEDY: &str = "load the module kvm_intel or kvm_amd; in a virtual machine, have nested virtualization enabled on its host";

/// What runs a VM in this configuration, and why.
pub(super) fn choice(subject: &Subject) -> Finding {
    match chosen(subject) {
        Choice::Builtin => builtin(),
        Choice::Qemu => accelerator(subject),
    }
}

pub(super) fn chosen(subject: &Subject) -> Choice {
    selection::choose(&subject.config, || detect::kvm(&Root::machine_path()))
}

/// A finding about something of QEMU's: without importance when QEMU is not used.
fn of_qemu(subject: &Subject, finding: Finding) -> Finding {
    match (finding.level, chosen(subject)) {
        (Level::Ok, _) | (_, Choice::Qemu) => finding,
        (_, Choice::Builtin) => {
            let text = format!("not needed by the built-in hypervisor ({})", finding.text);
            Finding::ok(finding.name, text)
        }
    }
}

fn builtin() -> Finding {
    const NAME: &str = "hypervisor";
    match detect::kvm(&Root::machine_path()) {
        KvmStatus::Usable => Finding::ok(NAME, "builtin with KVM, which works"),
        status => Finding::fail(
            NAME,
            format!("hypervisor is \"builtin\", but KVM does not work: {status}"),
            "set hypervisor to \"auto\" in config.toml, or make KVM work",
        ),
    }
}

/// What QEMU does about KVM in this configuration.
fn accelerator(subject: &Subject) -> Finding {
    const NAME: &str = "hypervisor";
    const SLOW: &str = "everything in the guest takes about ten times as long";
    let accel = subject.config.qemu.accel;
    let status = match accel {
        Accel::Tcg => {
            let text = "qemu, emulating (TCG), because qemu.accel is \"tcg\"";
            return Finding::ok(NAME, text);
        }
        Accel::Kvm | Accel::Auto => detect::kvm(&Root::machine_path()),
    };
    match (status, accel) {
        (KvmStatus::Usable, _) => Finding::ok(NAME, "qemu with KVM, which works"),
        (status, Accel::Kvm) => Finding::fail(
            NAME,
            format!("qemu.accel is \"kvm\", but KVM does not work: {status}"),
            "set qemu.accel to \"auto\" in config.toml, or make KVM work",
        ),
        (status, _) => Finding::warn(
            NAME,
            format!("qemu, emulating (TCG), because KVM does not work: {status}"),
            format!("{SLOW}; make KVM work"),
        ),
    }
}

pub(super) fn kvm(_: &Subject) -> Finding {
    const NAME: &str = "KVM";
    let dir = Root::machine_path();
    match detect::kvm(&dir) {
        KvmStatus::Usable => Finding::ok(NAME, "it works"),
        KvmStatus::Absent => Finding::warn(NAME, KvmStatus::Absent.to_string(), KVM_REMEDY),
        KvmStatus::Unusable { reason } => Finding::warn(
            NAME,
            reason,
            format!(
                "{KVM_REMEDY}; removing {} has it tried again",
                dir.join("kvm.json").display()
            ),
        ),
    }
}

pub(super) fn firmware(subject: &Subject) -> Finding {
    let qemu = &subject.config.qemu;
    let finding = match requirements::firmware(qemu) {
        Ok(()) => Finding::ok("firmware", qemu.firmware.display().to_string()),
        Err(e) => unusable("firmware", &e),
    };
    of_qemu(subject, finding)
}

pub(super) fn qemu(subject: &Subject) -> Finding {
    of_qemu(subject, program(subject))
}

fn program(subject: &Subject) -> Finding {
    const NAME: &str = "QEMU";
    const REMEDY: &str =
        "install the package qemu-system-x86, or set qemu.path in config.toml to one that works";
    let path = &subject.config.qemu.path;
    if let Err(e) = requirements::program(&subject.config.qemu) {
        return unusable(NAME, &e);
    }
    let line = match version(path) {
        Ok(line) => line,
        Err(e) => {
            let text = format!("{} does not tell its version: {e}", path.display());
            return Finding::fail(NAME, text, REMEDY);
        }
    };
    let text = format!("{} ({line})", path.display());
    match number(&line) {
        Some(version) if version < OLDEST => {
            let (major, minor) = OLDEST;
            let remedy = format!("the oldest tested version is {major}.{minor}: update it");
            Finding::warn(NAME, text, remedy)
        }
        Some(_) => Finding::ok(NAME, text),
        None => Finding::warn(NAME, text, "its version cannot be told from its words"),
    }
}

/// The first line that `--version` prints.
///
/// # Errors
/// It cannot be executed, is silent, or takes too long.
pub(super) fn version(path: &Path) -> io::Result<String> {
    let mut child = Command::new(path)
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let line = first_line(&mut child);
    // It has ended, or it is of no use any more.
    let _ = child.kill();
    child.wait()?;
    line
}

fn first_line(child: &mut std::process::Child) -> io::Result<String> {
    let mut stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut bytes = [0; 512];
    if !wait_readable(stdout.as_fd(), VERSION_DEADLINE)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let len = stdout.read(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes[..len]).into_owned();
    match text.lines().next() {
        Some(line) if !line.trim().is_empty() => Ok(line.trim().to_owned()),
        _ => Err(io::Error::other("it prints nothing")),
    }
}

/// Major and minor version in `QEMU emulator version 7.2.22 (...)`.
fn number(line: &str) -> Option<(u32, u32)> {
    let (_, rest) = line.split_once("version ")?;
    let mut parts = rest.split(|c: char| !c.is_ascii_digit());
    let mut next = || parts.next()?.parse().ok();
    Some((next()?, next()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Hypervisor};

    fn ask(question: fn(&Subject) -> Finding, edit: impl FnOnce(&mut Config)) -> Finding {
        let mut config = Config::default();
        edit(&mut config);
        let root = Root::new(None);
        question(&Subject { root, config })
    }

    #[test]
    fn versions_are_read_from_qemus_words() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)";
        assert_eq!(number(debian), Some((7, 2)));
        assert_eq!(number("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(number("something else"), None);
    }

    #[test]
    fn a_program_that_is_not_qemu_does_not_pass() {
        let emulating = |path: &'static str| {
            ask(qemu, |c| {
                c.qemu.accel = Accel::Tcg;
                c.qemu.path = path.into();
            })
        };
        let missing = emulating("/no/such/qemu");
        assert_eq!(missing.level, Level::Fail);
        assert!(missing.remedy.unwrap().contains("qemu-system-x86"));
        let silent = emulating("/usr/bin/test");
        assert_eq!(silent.level, Level::Fail);
        let other = emulating("/bin/echo");
        assert_eq!(other.level, Level::Warn, "{other:?}");
        let unneeded = ask(qemu, |c| {
            c.hypervisor = Hypervisor::Builtin;
            c.qemu.path = "/no/such/qemu".into();
        });
        assert_eq!(unneeded.level, Level::Ok, "{unneeded:?}");
    }

    #[test]
    fn emulation_by_choice_is_fine_and_kvm_by_force_is_not_replaced() {
        let chosen = ask(choice, |c| c.qemu.accel = Accel::Tcg);
        assert_eq!(chosen.level, Level::Ok);
        let forced = ask(choice, |c| c.qemu.accel = Accel::Kvm);
        assert_ne!(forced.level, Level::Warn);
        let builtin = ask(choice, |c| c.hypervisor = Hypervisor::Builtin);
        assert_ne!(builtin.level, Level::Warn);
    }
}
