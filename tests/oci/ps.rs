//! `ps`: what runs in a container.

use kuasar_runv_test_harness::{Container, SHORT, Value, World, process, reaper, wait_until};

fn sleeping(world: &World) -> Container<'_> {
    world.start(&world.bundle().args(["sleep", "1000"]), "c")
}

fn pids(container: &Container<'_>) -> Vec<i32> {
    let out = container.command(&["ps", "--format", "json"]).ok();
    let list: Value = serde_json::from_slice(&out.stdout).unwrap();
    let list = list.as_array().cloned().unwrap_or_default();
    list.iter()
        .map(|pid| i32::try_from(pid.as_i64().unwrap()).unwrap())
        .collect()
}

#[test]
fn json_has_the_pids_of_the_container_and_of_its_execs() {
    let world = World::new();
    let container = world.create(&world.bundle().args(["sleep", "1000"]), "c");
    assert_eq!(pids(&container), [container.pid]);
    container.start();
    let exec = container.exec_detached("sleep 1000", "e");
    let mut expected = vec![container.pid, exec];
    expected.sort_unstable();
    assert_eq!(pids(&container), expected);
    process::signal(exec, libc::SIGKILL).unwrap();
    let _ = reaper::wait(exec, SHORT);
    wait_until("end of the exec", SHORT, || {
        pids(&container) == [container.pid]
    });
    let _ = container.kill("KILL").ok();
    let _ = container.wait();
    container.wait_for_status("stopped");
    let out = container.command(&["ps", "--format", "json"]).ok();
    assert_eq!(out.stdout(), "null\n");
}

#[test]
fn the_table_shows_every_process_of_the_container() {
    let world = World::new();
    let container = sleeping(&world);
    let exec = container.exec_detached("sleep 2000; exit 0", "e");
    let table = |options: &[&str]| {
        let call = world.call(["ps", &container.id]).args(options);
        let text = call.output().ok().stdout();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    // Both programs, and not what they were before.
    wait_until("both sleeps", SHORT, || {
        let shown = table(&[]);
        let shows = |end: &str| shown.iter().any(|line| line.ends_with(end));
        shown.len() == 4 && shows(" sleep 1000") && shows(" sleep 2000")
    });
    let words = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let full = table(&[]);
    assert_eq!(
        words(&full[0]).join(" "),
        "UID PID PPID C STIME TTY TIME CMD"
    );
    assert_eq!(
        full.iter()
            .filter(|line| line.ends_with(" sleep 1000"))
            .count(),
        1
    );
    assert_eq!(
        full.iter()
            .filter(|line| line.ends_with(" sleep 2000"))
            .count(),
        1
    );
    assert!(full[1].starts_with("root "), "{full:?}");
    assert_eq!(table(&["-e", "-f"])[0], full[0]);
    let user = table(&["aux"]);
    assert_eq!(
        words(&user[0]).join(" "),
        "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND"
    );
    // The columns can be told apart by their places. busybox executes /proc/self/exe, and
    // gives the process its name afterwards.
    let rows = || {
        let list = table(&["-e", "-o", "pid,ppid,stat,comm,args"]);
        list[1..].iter().map(|line| words(line)).collect::<Vec<_>>()
    };
    wait_until("sleep has its name", SHORT, || {
        rows()
            .iter()
            .any(|row| row[3..] == ["sleep", "sleep", "2000"])
    });
    let rows = rows();
    let shell = rows.iter().find(|row| row[4] == "/bin/sh").unwrap();
    let child = rows
        .iter()
        .find(|row| row[4..] == ["sleep", "2000"])
        .unwrap();
    assert_eq!(child[1], shell[0], "the shell is the parent of its sleep");
    // Sleeping, running, or waiting for its own pages.
    assert!(["S", "R", "D"].contains(&child[2].as_str()), "{}", child[2]);
    process::signal(exec, libc::SIGKILL).unwrap();
    let _ = reaper::wait(exec, SHORT);
}

#[test]
fn a_stopped_container_has_an_empty_table() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("exit 0"), "c");
    assert_eq!(container.exit_code(), 0);
    container.wait_for_status("stopped");
    let out = container.command(&["ps"]).ok();
    assert_eq!(out.stdout().lines().count(), 1);
    assert!(out.stdout().starts_with("UID "));
}

#[test]
fn mistakes_are_named() {
    let world = World::new();
    let container = sleeping(&world);
    let ps = |options: &[&str]| world.call(["ps", &container.id]).args(options).output();
    let _ = ps(&["-e", "-o", "comm"]).fails_with(1, "couldn't find PID field in ps output");
    let _ = ps(&["-Q"]).fails_with(1, "support");
    let _ = ps(&["-e", "-o", "pid,nope"]).fails_with(1, "nope");
    let _ = container
        .command(&["ps", "--format", "xml"])
        .fails_with(1, "invalid format option");
    let _ = world
        .call(["ps", &world.id("nobody")])
        .output()
        .fails_with(1, "container does not exist");
}
