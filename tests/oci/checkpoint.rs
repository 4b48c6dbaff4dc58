//! `checkpoint` and `restore`: what callers look up. podman reads the help to
//! find out which options there are.

use kuasar_runv_test_harness::{World, runc};

#[test]
fn help_lists_the_options_of_runc() {
    let world = World::new();
    for command in ["checkpoint", "restore"] {
        let call = world.bare_call().args([command, "--help"]);
        let help = call.output().ok().stdout();
        for flag in runc::flags(command) {
            assert!(help.contains(flag), "{command} --help has no {flag}");
        }
    }
}

#[test]
fn an_unknown_container_has_no_checkpoint() {
    let world = World::new();
    let id = world.id("unknown");
    let call = world.call(["checkpoint", "--image-path", "/tmp", &id]);
    let _ = call.output().fails_with(1, "container does not exist");
}
