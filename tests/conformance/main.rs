//! docs/conformance.md is complete and true: it has every field of config.json and every
//! command and flag of runc, and what it calls supported on the command line is there.

// The lints keep panics out of the product; a test fails by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fields;

use std::collections::BTreeMap;
use std::fs;

use kuasar_runv_test_harness::runc::COMMANDS as RUNC;
use kuasar_runv_test_harness::{Invocation, Runtime, runtime::repository};
use oci_spec::runtime::Spec;

/// What the second column of a table may start with.
const VERDICTS: [&str; 4] = ["supported", "differs", "refused", "ignored"];

/// Names in the first columns of the tables, with their second and third.
fn rows() -> BTreeMap<String, (String, String)> {
    let text = fs::read_to_string(repository().join("docs/conformance.md")).unwrap();
    let mut rows = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [names, verdict, remark] = cells[..] else {
            panic!("not three columns: {line}");
        };
        assert!(VERDICTS.contains(&verdict), "{verdict:?} in {line}");
        for name in names.split('`').skip(1).step_by(2) {
            let row = (verdict.to_owned(), remark.to_owned());
            assert!(
                rows.insert(name.to_owned(), row).is_none(),
                "{name} comes twice"
            );
        }
    }
    rows
}

#[test]
fn every_field_of_the_configuration_is_in_the_table() {
    let rows = rows();
    let fields = fields::of::<Spec>();
    let missing: Vec<_> = fields.iter().filter(|f| !rows.contains_key(*f)).collect();
    assert!(
        missing.is_empty(),
        "not in docs/conformance.md: {missing:#?}"
    );
    let is_field = |name: &&String| !name.contains(' ') && !name.starts_with("--");
    let commands: Vec<_> = RUNC.iter().map(|(name, _)| *name).collect();
    let unknown: Vec<_> = rows
        .keys()
        .filter(is_field)
        .filter(|name| !fields.contains(*name) && !commands.contains(&name.as_str()))
        .collect();
    assert!(unknown.is_empty(), "no such field or command: {unknown:?}");
}

#[test]
fn every_command_and_flag_of_runc_is_in_the_table() {
    let rows = rows();
    for (command, flags) in RUNC {
        assert!(
            command.is_empty() || rows.contains_key(*command),
            "{command}"
        );
        for flag in *flags {
            let long = flag.split(' ').next().unwrap();
            let name = format!("{command} {long}");
            assert!(rows.contains_key(name.trim_start()), "{name}");
        }
    }
}

/// What does not work says how, or with which words it is refused.
#[test]
fn every_difference_is_explained() {
    for (name, (verdict, remark)) in rows() {
        assert!(verdict == "supported" || !remark.is_empty(), "{name}");
    }
}

/// The help of a command; `None` when it does not exist.
fn help(command: &str) -> Option<String> {
    let mut call = Invocation::new(&Runtime::built().binary);
    if !command.is_empty() {
        call = call.arg(command);
    }
    let out = call.arg("--help").output();
    (out.code() == 0).then(|| out.stdout())
}

#[test]
fn what_is_supported_on_the_command_line_is_there() {
    let rows = rows();
    for (command, flags) in RUNC {
        let help = help(command).unwrap_or_else(|| panic!("there is no command {command}"));
        for flag in *flags {
            let mut forms = flag.split(' ');
            let long = forms.next().unwrap();
            let (verdict, _) = &rows[format!("{command} {long}").trim_start()];
            if verdict != "supported" {
                continue;
            }
            let words: Vec<_> = help.split([' ', ',', '\n', '=', '[']).collect();
            assert!(words.contains(&long), "{command} {long}");
            if let Some(short) = forms.next() {
                assert!(words.contains(&short), "{command} {short}");
            }
        }
    }
}
