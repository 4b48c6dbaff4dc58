//! `checkpoint` and `restore`: what callers look up. podman reads the help to
//! find out which options there are.

use kuasar_runv_test_harness::World;

const CHECKPOINT: [&str; 15] = [
    "--image-path",
    "--work-path",
    "--parent-path",
    "--leave-running",
    "--tcp-established",
    "--ext-unix-sk",
    "--shell-job",
    "--lazy-pages",
    "--status-fd",
    "--page-server",
    "--file-locks",
    "--pre-dump",
    "--manage-cgroups-mode",
    "--empty-ns",
    "--auto-dedup",
];

const RESTORE: [&str; 18] = [
    "--console-socket",
    "--image-path",
    "--work-path",
    "--tcp-established",
    "--ext-unix-sk",
    "--shell-job",
    "--file-locks",
    "--manage-cgroups-mode",
    "--bundle",
    "--detach",
    "--pid-file",
    "--no-subreaper",
    "--no-pivot",
    "--empty-ns",
    "--auto-dedup",
    "--lazy-pages",
    "--lsm-profile",
    "--lsm-mount-context",
];

#[test]
fn help_lists_the_options_of_runc() {
    let world = World::new();
    for (command, flags) in [("checkpoint", &CHECKPOINT[..]), ("restore", &RESTORE)] {
        let call = world.bare_call().args([command, "--help"]);
        let help = call.output().ok().stdout();
        for flag in flags {
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
