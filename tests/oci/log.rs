//! `--log`, `--log-format` and `--debug`: where callers look for the error.

use std::fs;

use kuasar_runv_test_harness::{Value, World};

fn last_line(world: &World, name: &str) -> String {
    let text = fs::read_to_string(world.path(name)).unwrap();
    text.lines().last().unwrap_or_default().to_owned()
}

/// containerd's shim and podman decode the last line of the JSON log.
#[test]
fn the_last_line_of_a_json_log_is_the_error() {
    let world = World::new();
    let id = world.id("unknown");
    let call = world.call(["--log-format", "json", "--log"]);
    let out = call.arg(world.path("log")).args(["start", &id]).output();
    let out = out.fails_with(1, "container does not exist");
    assert!(
        !out.stderr().contains('{'),
        "stderr is for people: {}",
        out.stderr()
    );
    let entry: Value = serde_json::from_str(&last_line(&world, "log")).unwrap();
    assert_eq!(entry["level"], "error");
    assert!(
        entry["msg"]
            .as_str()
            .unwrap()
            .contains("container does not exist")
    );
    let time = entry["time"].as_str().unwrap();
    assert!(time.len() >= 20 && time.contains('T'), "RFC 3339: {time}");
}

#[test]
fn errors_of_the_guest_reach_the_json_log_too() {
    let world = World::new();
    let bundle = world.bundle().args(["no-such-program"]);
    let call = world
        .call(["--log-format=json", "--log"])
        .arg(world.path("log"));
    let call = call.args(["create", "--bundle"]).arg(bundle.path());
    let _ = call.arg(world.id("c")).output().exits_with(1);
    let entry: Value = serde_json::from_str(&last_line(&world, "log")).unwrap();
    assert_eq!(entry["level"], "error");
    let message = entry["msg"].as_str().unwrap();
    assert!(
        message.contains("executable file not found in $PATH"),
        "{message}"
    );
}

#[test]
fn a_text_log_has_time_level_and_message() {
    let world = World::new();
    let id = world.id("unknown");
    let call = world.call(["--log"]).arg(world.path("log"));
    let _ = call.args(["state", &id]).output().exits_with(1);
    let line = last_line(&world, "log");
    assert!(line.starts_with("time=\""), "{line}");
    assert!(
        line.contains(" level=error msg=\"container does not exist\""),
        "{line}"
    );
}

#[test]
fn the_log_is_appended_to() {
    let world = World::new();
    fs::write(world.path("log"), "kept\n").unwrap();
    let call = world.call(["--log"]).arg(world.path("log"));
    let _ = call.args(["state", "x"]).output().exits_with(1);
    let text = fs::read_to_string(world.path("log")).unwrap();
    assert!(text.starts_with("kept\n"), "{text}");
    assert_eq!(text.lines().count(), 2, "{text}");
}

#[test]
fn a_success_writes_no_error() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0");
    let call = world.call(["--debug", "--log-format", "json", "--log"]);
    let call = call.arg(world.path("log")).args(["run", "-b"]);
    let out = call.arg(bundle.path()).arg(world.id("c")).output().ok();
    assert_eq!(out.stderr(), "");
    let text = fs::read_to_string(world.path("log")).unwrap();
    assert!(!text.is_empty(), "--debug says something");
    for line in text.lines() {
        let entry: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert_ne!(entry["level"], "error", "{line}");
    }
}

#[test]
fn an_unknown_log_format_is_refused() {
    let world = World::new();
    let _ = world
        .call(["--log-format", "xml", "list"])
        .output()
        .fails_about(1, "log-format");
}

#[test]
fn a_log_that_cannot_be_opened_fails_the_call() {
    let world = World::new();
    let path = world.path("missing/log");
    let call = world.call(["--log"]).arg(&path).arg("list");
    let words = format!("open {}: no such file or directory", path.display());
    let _ = call.output().fails_with(1, &words);
}

/// An engine that passes a flag the runtime does not know shows what is in the log.
#[test]
fn what_is_wrong_with_the_command_line_is_in_the_log() {
    let world = World::new();
    let call = world.call(["--log-format", "json", "--log"]);
    let call = call
        .arg(world.path("log"))
        .args(["state", "--no-such-flag", "c"]);
    let _ = call.output().exits_with(1);
    let entry: Value = serde_json::from_str(&last_line(&world, "log")).unwrap();
    assert_eq!(entry["level"], "error");
    let message = entry["msg"].as_str().unwrap();
    assert!(message.contains("-no-such-flag"), "{message}");
}
