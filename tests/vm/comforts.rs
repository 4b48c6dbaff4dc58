//! What makes a person's life easier: `check`, `env`, completion, the manual, help,
//! colours.

use std::fs;
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::screen::spawn_on;
use kuasar_runv_test_harness::{Screen, Value, World, leaks};

fn check_json(world: &World, code: i32) -> Vec<Value> {
    let out = world.call(["check", "--json"]).output().exits_with(code);
    let value: Value = serde_json::from_slice(&out.stdout).unwrap();
    value.as_array().unwrap().clone()
}

fn finding<'a>(findings: &'a [Value], name: &str) -> &'a Value {
    let found = findings.iter().find(|f| f["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {findings:?}"))
}

#[test]
fn check_finds_everything_and_starts_nothing() {
    let world = World::new();
    let asked = Instant::now();
    let findings = check_json(&world, 0);
    assert!(asked.elapsed() < Duration::from_secs(10));
    let hypervisor = finding(&findings, "hypervisor")["text"].as_str().unwrap();
    assert!(hypervisor.contains("emulating"), "{hypervisor}");
    assert!(hypervisor.contains("qemu.accel is \"tcg\""), "{hypervisor}");
    for name in [
        "QEMU",
        "firmware",
        "guest kernel",
        "guest image",
        "state root",
    ] {
        assert_eq!(finding(&findings, name)["level"], "OK", "{name}");
    }
    let configuration = finding(&findings, "configuration")["text"]
        .as_str()
        .unwrap();
    assert!(configuration.contains(world.name()), "{configuration}");
    for finding in &findings {
        let has_remedy = finding.get("remedy").is_some();
        assert_eq!(has_remedy, finding["level"] != "OK", "{finding}");
    }
    // Not even the state root has been made.
    assert!(!world.root.exists());
    assert!(leaks::processes(world.name()).is_empty());
}

#[test]
fn check_fails_with_a_remedy_when_no_vm_could_run() {
    let mut world = World::new();
    world.configure("[qemu]\npath = \"/no/such/qemu\"\naccel = \"tcg\"\n[guest]\nkernel = \"/etc/passwd\"\nimage = \"/no/such/image\"\n");
    let findings = check_json(&world, 1);
    for (name, remedy) in [
        ("QEMU", "install the package qemu-system-x86"),
        ("guest kernel", "make kernel"),
        ("guest image", "make install"),
    ] {
        let finding = finding(&findings, name);
        assert_eq!(finding["level"], "FAIL", "{finding}");
        assert!(
            finding["remedy"].as_str().unwrap().contains(remedy),
            "{finding}"
        );
    }
    let text = world.call(["check"]).output().exits_with(1).stdout();
    assert!(
        text.contains("FAIL  QEMU           cannot use the QEMU binary"),
        "{text}"
    );
    world.configure("[vm]\nvcpu = 2\n");
    let findings = check_json(&world, 1);
    let configuration = finding(&findings, "configuration");
    assert_eq!(configuration["level"], "FAIL");
    let text = configuration["text"].as_str().unwrap();
    assert!(text.contains("did you mean \"vcpus\"?"), "{text}");
}

#[test]
fn env_says_what_a_bug_report_needs() {
    let world = World::new();
    let out = world.call(["env", "--json"]).output().ok();
    let facts: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(facts["runtime"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(facts["configuration"]["in_effect"]["qemu"]["accel"], "tcg");
    assert_eq!(facts["paths"]["root"], world.root.to_str().unwrap());
    assert!(facts["qemu"].as_str().unwrap().contains("QEMU"));
    assert!(facts["guest"]["kernel"]["bytes"].as_u64().unwrap() > 1 << 20);
    assert_eq!(facts["containers"], 0);
    assert!(facts["host"]["kernel"].is_string());
    assert!(facts["check"].is_array());
    let text = world.call(["env"]).output().ok().stdout();
    assert!(
        text.contains("\nconfiguration.in_effect.vm.vcpus: 1\n"),
        "{text}"
    );
    assert!(text.lines().all(|line| line.contains(": ")), "{text}");
}

#[test]
fn shells_accept_the_completion_scripts() {
    let world = World::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = world.call(["completion", shell]).output().ok().stdout();
        for word in ["create", "checkpoint-not-there", "--pid-file"] {
            let expected = word != "checkpoint-not-there";
            // fish writes options without their dashes.
            let word = if shell == "fish" {
                word.trim_start_matches('-')
            } else {
                word
            };
            assert_eq!(script.contains(word), expected, "{shell}: {word}");
        }
    }
    let script = world.path("complete.bash");
    let text = world.call(["completion", "bash"]).output().ok().stdout();
    let try_it = "\nCOMP_WORDS=(kuasar-runv sta); COMP_CWORD=1\n_kuasar__runv kuasar-runv sta kuasar-runv\necho \"${COMPREPLY[*]}\"\n";
    fs::write(&script, text + try_it).unwrap();
    let bash = kuasar_runv_test_harness::Invocation::new("/bin/bash".as_ref()).arg(&script);
    assert_eq!(bash.output().ok().stdout(), "start state\n");
    let _ = world
        .call(["completion", "command.com"])
        .output()
        .fails_about(1, "invalid value");
}

#[test]
fn the_manual_has_a_page_for_every_command() {
    let world = World::new();
    let dir = world.path("man");
    let _ = world.call(["man"]).arg(&dir).output().ok();
    let help = world.call(["--help"]).output().ok().stdout();
    let commands: Vec<_> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    assert!(
        commands.contains(&"create") && commands.contains(&"check"),
        "{commands:?}"
    );
    for command in &commands {
        let page = fs::read_to_string(dir.join(format!("kuasar-runv-{command}.8"))).unwrap();
        for section in [".SH NAME", ".SH SYNOPSIS", ".SH OPTIONS", ".SH EXAMPLES"] {
            assert!(page.contains(section), "{command}: {section}");
        }
    }
    let page = fs::read_to_string(dir.join("kuasar-runv.8")).unwrap();
    assert!(page.contains(".SH SUBCOMMANDS"), "{page}");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), commands.len() + 1);
}

#[test]
fn colours_are_for_terminals_only_and_can_be_switched_off() {
    let world = World::new();
    const ESCAPE: &str = "\x1b[";
    for words in [["check", "--"], ["run", "--help"]] {
        let words: Vec<_> = words.into_iter().filter(|w| *w != "--").collect();
        let call = || world.call(&words).env("TERM", "xterm");
        let piped = call().output().stdout();
        assert!(!piped.contains(ESCAPE), "{words:?}: {piped}");
        let on_a_terminal = |call| {
            let (mut screen, slave) = Screen::open(24, 80);
            let _ = spawn_on(&slave, &[0, 1, 2], call).wait();
            drop(slave);
            screen.shows_within(ESCAPE, Duration::from_secs(2))
        };
        assert!(on_a_terminal(call()), "{words:?}");
        assert!(!on_a_terminal(call().env("NO_COLOR", "1")), "{words:?}");
    }
}

#[test]
fn a_mistyped_command_is_answered_with_what_was_meant() {
    let world = World::new();
    let out = world.call(["strat", "c"]).output();
    let _ = out.fails_about(3, "'start'");
    let out = world.call(["create", "--bundel", "x", "c"]).output();
    let _ = out.fails_about(1, "--bundle");
}
