//! Standard streams: nothing is lost, everything ends, and a slow reader slows the
//! program instead of filling memory.

use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::thread;
use std::time::Duration;

use kuasar_runv_test_harness::{CALL, SHORT, World, data, leaks, process, wait_until};

#[test]
fn stdin_arrives_whole_and_its_end_is_seen() {
    let world = World::new();
    let input = data::bytes(1, 300 * 1024);
    let bundle = world.bundle().args(["cat"]);
    let out = world
        .run_call(&bundle, "c")
        .stdin_bytes(input.clone())
        .output()
        .ok();
    assert!(
        out.stdout == input,
        "{} of {} bytes came back",
        out.stdout.len(),
        input.len()
    );
}

#[test]
fn an_empty_stdin_ends_at_once() {
    let world = World::new();
    let bundle = world.bundle().sh("cat; echo end");
    let out = world.run_call(&bundle, "c").stdin_bytes("").output().ok();
    assert_eq!(out.stdout(), "end\n");
    let out = world
        .run(&world.bundle().sh("cat; echo end of null"), "null")
        .ok();
    assert_eq!(out.stdout(), "end of null\n");
}

#[test]
fn the_end_of_stdin_leaves_stdout_open() {
    let world = World::new();
    let bundle = world.bundle().sh("cat >/dev/null; sleep 0.3; seq 1 20000");
    let out = world.run_call(&bundle, "c").stdin_bytes("x").output().ok();
    let numbers: String = (1..=20000).map(|n| format!("{n}\n")).collect();
    assert!(out.stdout() == numbers, "{} bytes", out.stdout.len());
}

#[test]
fn input_and_output_are_relayed_while_the_program_runs() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("while read line; do echo \"<$line>\"; done");
    let mut running = world
        .run_call(&bundle, "c")
        .stdin_pipe()
        .stdout_pipe()
        .spawn();
    let mut stdin = running.stdin.take().unwrap();
    let mut stdout = running.stdout.take().unwrap();
    for word in ["one", "two", "three"] {
        writeln!(stdin, "{word}").unwrap();
        let mut answer = vec![0; word.len() + 3];
        stdout.read_exact(&mut answer).unwrap();
        assert_eq!(answer, format!("<{word}>\n").as_bytes());
    }
    drop(stdin);
    let _ = running.wait().ok();
}

#[test]
fn stdout_and_stderr_stay_apart_and_complete() {
    let world = World::new();
    let out = world
        .run_script("seq 1 30000 & seq 30001 60000 >&2 & wait")
        .ok();
    let lines = |from: u32, to: u32| -> String { (from..=to).map(|n| format!("{n}\n")).collect() };
    assert!(
        out.stdout() == lines(1, 30000),
        "{} bytes of stdout",
        out.stdout.len()
    );
    assert!(
        out.stderr() == lines(30001, 60000),
        "{} bytes of stderr",
        out.stderr.len()
    );
}

/// conmon and the shim stop reading soon after the process has ended.
#[test]
fn all_output_is_out_before_the_process_ends() {
    let world = World::new();
    let bundle = world.bundle().args(["cat", "/data"]);
    let expected = data::bytes(2, 2 << 20);
    fs::write(bundle.rootfs().join("data"), &expected).unwrap();
    let container = world.start(&bundle, "c");
    assert_eq!(container.exit_code(), 0);
    assert!(fs::read(container.stdout_file()).unwrap() == expected);
}

const MANY: usize = 100 << 20;

#[test]
fn a_hundred_megabytes_pass_a_slow_reader_without_loss_or_memory() {
    let world = World::new();
    let bundle = world.bundle().args(["cat", "/data"]);
    data::write(3, MANY, File::create(bundle.rootfs().join("data")).unwrap()).unwrap();
    let mut running = world.run_call(&bundle, "c").stdout_pipe().spawn();
    let mut stdout = BufReader::with_capacity(64 << 10, running.stdout.take().unwrap());

    let mut prng = data::Prng::new(3);
    let (mut got, mut expected) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    let mut largest = 0;
    for block in 0..MANY / got.len() {
        stdout.read_exact(&mut got).unwrap();
        prng.fill(&mut expected);
        assert!(got == expected, "block {block} differs");
        if block % 100 == 0 {
            // Long enough for everything before us to fill up.
            thread::sleep(Duration::from_millis(100));
            largest = largest.max(anonymous_memory(&world));
        }
    }
    assert_eq!(stdout.read(&mut got).unwrap(), 0, "more than was written");
    let _ = running.wait().ok();
    // Nothing like the 100 MB that were waiting.
    assert!(
        largest < 48 << 10,
        "{largest} kB of anonymous memory outside the guest"
    );
}

/// Sum over the runtime's own processes, in kB. The guest's memory is shared, the
/// hypervisor's and the container's are not the runtime's.
fn anonymous_memory(world: &World) -> u64 {
    leaks::processes(world.name())
        .iter()
        .filter(|p| !p.comm.starts_with("qemu") && p.comm != "cat")
        .filter_map(|p| process::status_field(p.pid, "RssAnon"))
        .sum()
}

#[test]
fn a_reader_that_goes_away_ends_the_program_like_a_broken_pipe() {
    let world = World::new();
    // Not PID 1 of the container, which SIGPIPE would not end.
    let bundle = world.bundle().sh("sh -c 'exec yes'; exit $?");
    let mut running = world.run_call(&bundle, "c").stdout_pipe().spawn();
    let mut stdout = running.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 100]).unwrap();
    drop(stdout);
    let out = running.wait();
    assert!([1, 141].contains(&out.code()), "{}", out.code());
}

/// go-runc reads the shared stdout and stderr of these calls to their end.
#[test]
fn no_call_but_create_keeps_its_output_open() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("sleep 1000"), "c");
    // Every call of the harness collects both streams to their end.
    container.start();
    let _ = container.state();
    let _ = world.call(["list"]).output().ok();
    let _ = container.kill("KILL").ok();
    assert_eq!(container.exit_code(), 137);
    let _ = container.delete_force().ok();
}

#[test]
fn detached_output_goes_on_after_create_has_returned() {
    let world = World::new();
    let script = "n=0; while [ $n -lt 5 ]; do n=$((n + 1)); echo line $n; sleep 0.1; done";
    let container = world.start(&world.bundle().sh(script), "c");
    wait_until("five lines", SHORT, || {
        container.stdout().contains("line 5")
    });
    assert_eq!(container.exit_code(), 0);
    assert_eq!(container.stderr(), "");
}

#[test]
fn stdin_can_be_given_to_a_created_container() {
    let world = World::new();
    let bundle = world.bundle().args(["cat"]);
    let input = data::bytes(4, 300 * 1024);
    let call = world.create_call(bundle.path(), "c").stdin_pipe();
    let call = call.output_to(world.output_file("c.stdout"), world.output_file("c.stderr"));
    let mut running = call.spawn();
    let mut stdin = running.stdin.take().unwrap();
    let _ = running.wait().ok();
    let container = kuasar_runv_test_harness::Container::adopt(&world, "c");
    container.start();
    let sent = input.clone();
    let writer = thread::spawn(move || stdin.write_all(&sent));
    assert_eq!(container.wait_within(CALL).code(), Some(0));
    writer.join().unwrap().unwrap();
    assert!(fs::read(container.stdout_file()).unwrap() == input);
}

const BACKGROUND: &str = "(sleep 1; echo late) & echo first; exit 3";

/// Its children end with it, with a pid namespace of its own or without.
#[test]
fn a_containers_output_ends_with_its_process() {
    let world = World::new();
    let bundle = world.bundle().sh(BACKGROUND);
    let shared = world.bundle().sh(BACKGROUND).namespace("pid", None);
    for (bundle, name) in [(bundle, "own"), (shared, "shared")] {
        let out = world.run(&bundle, name).exits_with(3);
        assert_eq!(out.stdout(), "first\n", "{name} pid namespace");
    }
}

/// Its children belong to the container, and who waits for the output waits for them.
#[test]
fn an_execs_output_ends_when_its_children_have_closed_it() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("sleep 1000"), "c");
    let out = container.exec_sh(&[], BACKGROUND).exits_with(3);
    assert_eq!(out.stdout(), "first\nlate\n");
    // Who has closed it is not waited for.
    let script = "sleep 1000 >/dev/null 2>&1 & echo first";
    let out = container.exec_sh(&[], script).ok();
    assert_eq!(out.stdout(), "first\n");
}

#[test]
fn the_children_of_a_detached_exec_go_on() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("sleep 1000"), "c");
    let script = "(sleep 1; echo late && echo went on >/tmp/told) & echo first";
    let pid = container.exec_detached(script, "e");
    let ended = kuasar_runv_test_harness::reaper::wait(pid, SHORT).unwrap();
    assert_eq!(ended.code(), Some(0));
    let written = fs::read_to_string(world.path("e.stdout")).unwrap();
    assert_eq!(written, "first\n");
    wait_until("the child's end", SHORT, || {
        container.exec_sh(&[], "cat /tmp/told").stdout() == "went on\n"
    });
}
