//! The agent's program where it does not belong: on a host, called by a curious user.

use std::process::Command;

#[test]
fn it_says_what_it_is_and_touches_nothing() {
    // In namespaces of its own, where it could do no harm if it tried.
    let output = Command::new("unshare")
        .args(["--mount", "--pid", "--fork", "sh", "-c"])
        .arg("\"$0\"; echo \"code=$?\"; cat /proc/self/mountinfo")
        .arg(env!("CARGO_BIN_EXE_kuasar-runv-agent"))
        .output()
        .expect("unshare(1)");
    let printed = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(printed.starts_with("code=2\n"), "{printed}{said}");
    assert!(
        said.contains("init of kuasar-runv's virtual machines"),
        "{said}"
    );
    let own = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert_eq!(
        printed.lines().count() - 1,
        own.lines().count(),
        "{printed}"
    );
}
