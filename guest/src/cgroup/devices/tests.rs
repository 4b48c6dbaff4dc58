use super::*;
use crate::bpf::machine;
use oci_spec::runtime::LinuxDeviceCgroupBuilder;

fn run(program: &[Insn], device_type: u32, major: u32, minor: u32, access: u32) -> bool {
    let mut context = [access << 16 | device_type, major, minor];
    machine::run(program, &mut context, 0) != 0
}

fn rule(allow: bool, typ: LinuxDeviceType, numbers: (i64, i64), access: &str) -> LinuxDeviceCgroup {
    LinuxDeviceCgroupBuilder::default()
        .allow(allow)
        .typ(typ)
        .major(numbers.0)
        .minor(numbers.1)
        .access(access)
        .build()
        .unwrap()
}

fn program_of(given: &[LinuxDeviceCgroup]) -> Vec<Insn> {
    program(&rules(given).unwrap())
}

const READ_WRITE: u32 = ACC_READ | ACC_WRITE;

#[test]
fn standard_devices_are_allowed_and_others_are_not() {
    let deny_all = [rule(false, LinuxDeviceType::A, (-1, -1), "rwm")];
    for given in [&[][..], &deny_all] {
        let p = program_of(given);
        assert!(run(&p, DEV_CHAR, 1, 3, READ_WRITE));
        assert!(run(&p, DEV_CHAR, 136, 77, READ_WRITE));
        assert!(run(&p, DEV_BLOCK, 8, 0, ACC_MKNOD));
        assert!(!run(&p, DEV_BLOCK, 8, 0, ACC_READ));
        assert!(!run(&p, DEV_CHAR, 10, 200, ACC_READ));
        assert!(!run(&p, DEV_CHAR, 1, 1, READ_WRITE));
    }
}

#[test]
fn an_allowed_device_is_allowed_for_that_access_only() {
    let p = program_of(&[rule(true, LinuxDeviceType::C, (10, 229), "r")]);
    assert!(run(&p, DEV_CHAR, 10, 229, ACC_READ));
    assert!(!run(&p, DEV_CHAR, 10, 229, ACC_WRITE));
    assert!(!run(&p, DEV_CHAR, 10, 229, READ_WRITE));
    assert!(!run(&p, DEV_CHAR, 10, 230, ACC_READ));
    assert!(!run(&p, DEV_BLOCK, 10, 229, ACC_READ));
}

#[test]
fn two_rules_together_allow_what_neither_does_alone() {
    let p = program_of(&[
        rule(true, LinuxDeviceType::C, (10, 1), "r"),
        rule(true, LinuxDeviceType::C, (10, -1), "w"),
    ]);
    assert!(run(&p, DEV_CHAR, 10, 1, READ_WRITE));
    assert!(!run(&p, DEV_CHAR, 10, 2, READ_WRITE));
}

#[test]
fn the_last_rule_decides() {
    let p = program_of(&[
        rule(true, LinuxDeviceType::A, (-1, -1), "rwm"),
        rule(false, LinuxDeviceType::B, (8, -1), "w"),
    ]);
    assert!(run(&p, DEV_CHAR, 99, 99, READ_WRITE));
    assert!(run(&p, DEV_BLOCK, 8, 1, ACC_READ));
    assert!(!run(&p, DEV_BLOCK, 8, 1, READ_WRITE));
    assert!(run(&p, DEV_BLOCK, 9, 1, READ_WRITE));
}

#[test]
fn rules_that_cannot_be_expressed_are_refused() {
    let refused = |r: LinuxDeviceCgroup| rules(&[r]).unwrap_err();
    assert_eq!(
        refused(rule(true, LinuxDeviceType::C, (1, 1), "rx")),
        RuleError::Access('x')
    );
    assert_eq!(
        refused(rule(true, LinuxDeviceType::P, (1, 1), "r")),
        RuleError::Type
    );
    assert_eq!(
        refused(rule(true, LinuxDeviceType::C, (1 << 40, 1), "r")),
        RuleError::Number(1 << 40)
    );
}
