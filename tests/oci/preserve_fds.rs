//! `--preserve-fds` and `LISTEN_FDS`: what the process gets besides stdio.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Read, Seek, SeekFrom, Write, pipe};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use kuasar_runv_test_harness::{
    Bundle, CALL, Container, Invocation, SHORT, World, data, reaper, wait_until,
};

fn run(world: &World, bundle: &Bundle, count: &str) -> Invocation {
    world
        .call(["run", "--preserve-fds", count, "--bundle"])
        .arg(bundle.path())
        .arg(world.id("c"))
}

fn sleeping(world: &World) -> Container<'_> {
    world.start(&world.bundle().sh("sleep 1000"), "c")
}

fn socket() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(CALL)).unwrap();
    ours.set_write_timeout(Some(CALL)).unwrap();
    (ours, theirs)
}

fn rest_of(mut reader: impl Read) -> String {
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn pipes_are_at_the_same_numbers_and_their_ends_are_seen() {
    let world = World::new();
    let bundle = world.bundle().sh("cat <&3 >&4");
    let (read, mut to_it) = pipe().unwrap();
    let (from_it, write) = pipe().unwrap();
    let call = run(&world, &bundle, "2").descriptors([read.into(), write.into()]);
    let running = call.spawn();
    let input = data::bytes(7, 300 * 1024);
    let sent = input.clone();
    let writer = thread::spawn(move || to_it.write_all(&sent));
    let mut got = Vec::new();
    { from_it }.read_to_end(&mut got).unwrap();
    assert!(got == input, "{} bytes", got.len());
    writer.join().unwrap().unwrap();
    let _ = running.wait().ok();
}

#[test]
fn a_process_has_what_was_preserved_and_nothing_else() {
    let world = World::new();
    let files = || [0; 3].map(|_| File::open("/dev/null").unwrap().into());
    // The list of the program that lists has one more, its own.
    let script = "cd /proc/$$/fd && for fd in *; do [ -e $fd ] && echo $fd; done; exit 0";
    let bundle = world.bundle().sh(script);
    let out = run(&world, &bundle, "2").descriptors(files()).output().ok();
    let all = out.stdout();
    let numbers: Vec<_> = all.lines().filter(|n| n.len() == 1).collect();
    assert_eq!(numbers, ["0", "1", "2", "3", "4"], "{all}");
    let container = sleeping(&world);
    let call = container.exec_call(["--preserve-fds", "1"], ["/bin/sh", "-c", script]);
    let all = call.descriptors(files()).output().ok().stdout();
    let numbers: Vec<_> = all.lines().filter(|n| n.len() == 1).collect();
    assert_eq!(numbers, ["0", "1", "2", "3"], "{all}");
}

/// A detached exec: in the foreground runc keeps descriptors open itself.
fn exec_detached(container: &Container<'_>, script: &str, descriptors: Vec<OwnedFd>) -> i32 {
    let world = container.world();
    let pid_file = world.pid_file("e");
    let count = descriptors.len().to_string();
    let flags = ["--detach", "--preserve-fds", &count, "--pid-file"].map(OsStr::new);
    let flags = flags.into_iter().chain([pid_file.as_os_str()]);
    let _ = container
        .exec_call(flags, ["/bin/sh", "-c", script])
        .descriptors(descriptors)
        .output_to(world.output_file("o"), world.output_file("e"))
        .output()
        .ok();
    fs::read_to_string(pid_file).unwrap().parse().unwrap()
}

/// Its end comes while the process runs.
#[test]
fn a_pipe_that_is_closed_in_the_container_is_closed() {
    let world = World::new();
    let container = sleeping(&world);
    let (read, mut to_it) = pipe().unwrap();
    let (from_it, write) = pipe().unwrap();
    let script = "echo first >&4; exec 4>&- 3<&-; sleep 1000";
    let pid = exec_detached(&container, script, vec![read.into(), write.into()]);
    assert_eq!(rest_of(from_it), "first\n");
    wait_until("a broken pipe", SHORT, || to_it.write_all(b"x").is_err());
    assert!(reaper::wait(pid, Duration::ZERO).is_none());
}

#[test]
fn a_reader_that_goes_away_breaks_the_pipe_in_the_container() {
    let world = World::new();
    let container = sleeping(&world);
    let (from_it, write) = pipe().unwrap();
    let script = "sh -c 'exec yes >&3'; echo $?";
    let call = container.exec_call(["--preserve-fds", "1"], ["/bin/sh", "-c", script]);
    let running = call.descriptors([write.into()]).spawn();
    { &from_it }.read_exact(&mut [0; 100]).unwrap();
    drop(from_it);
    let out = running.wait().ok().stdout();
    assert!(["1\n", "141\n"].contains(&out.as_str()), "{out}");
}

#[test]
fn a_slow_reader_of_a_pipe_slows_the_program_and_loses_nothing() {
    let world = World::new();
    let bundle = world.bundle().args(["sh", "-c", "cat /data >&3"]);
    let expected = data::bytes(8, 8 << 20);
    fs::write(bundle.rootfs().join("data"), &expected).unwrap();
    let (mut from_it, write) = pipe().unwrap();
    let running = run(&world, &bundle, "1")
        .descriptors([write.into()])
        .spawn();
    let mut got = vec![0; 4096];
    from_it.read_exact(&mut got).unwrap();
    // Long enough for everything on the way to fill up.
    thread::sleep(Duration::from_secs(1));
    from_it.read_to_end(&mut got).unwrap();
    assert!(got == expected, "{} bytes", got.len());
    let _ = running.wait().ok();
}

#[test]
fn a_socket_is_one_in_both_directions() {
    let world = World::new();
    let container = sleeping(&world);
    let (mut ours, theirs) = socket();
    // It reads to the end of one direction and answers in the other.
    let script = "question=$(cat <&3); echo \"<$question>\" >&3; ls -l /proc/self/fd/3";
    let call = container.exec_call(["--preserve-fds", "1"], ["/bin/sh", "-c", script]);
    let running = call.descriptors([theirs.into()]).spawn();
    ours.write_all(b"question").unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest_of(ours), "<question>\n");
    let out = running.wait().ok().stdout();
    assert!(out.contains("socket:["), "{out}");
}

#[test]
fn a_socket_that_is_closed_in_the_container_is_closed() {
    let world = World::new();
    let container = sleeping(&world);
    let (mut ours, theirs) = socket();
    let pid = exec_detached(&container, "exec 3<&-; sleep 1000", vec![theirs.into()]);
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
    wait_until("a broken socket", SHORT, || ours.write_all(b"x").is_err());
    assert!(reaper::wait(pid, Duration::ZERO).is_none());
}

#[test]
fn devices_are_what_they_are() {
    let world = World::new();
    let script = "head -c 3 <&3 | od -An -tx1; head -c 1000 <&4 | wc -c; cat <&5 | wc -c
        echo x >&5 && echo null; echo x >&6 || echo full";
    let open = |path: &str| -> OwnedFd {
        let file = File::options().read(true).write(true).open(path);
        file.unwrap().into()
    };
    let devices = ["/dev/zero", "/dev/urandom", "/dev/null", "/dev/full"].map(open);
    let bundle = world.bundle().sh(script);
    let out = run(&world, &bundle, "4").descriptors(devices).output();
    let words = out.stdout();
    let words: Vec<_> = words.split_whitespace().collect();
    assert_eq!(words, ["00", "00", "00", "1000", "0", "null", "full"]);
}

#[test]
fn files_are_open_where_and_as_they_were() {
    let world = World::new();
    let file = |name: &str, text: &str| {
        fs::write(world.path(name), text).unwrap();
        world.path(name)
    };
    let (read, append, both) = (
        file("read", "0123456789"),
        file("append", "one\n"),
        file("both", "abcdef"),
    );
    let script = "cat <&3; echo; echo two >&4; echo three >&4; head -c 2 <&5; echo; echo XY >&5
        echo no >&3 || echo read-only; cat <&4 || echo write-only";
    let open = || -> [OwnedFd; 3] {
        let mut part = File::open(&read).unwrap();
        part.seek(SeekFrom::Start(4)).unwrap();
        let append = File::options().append(true).open(&append).unwrap();
        let both = File::options().read(true).write(true).open(&both).unwrap();
        [part.into(), append.into(), both.into()]
    };
    let expected = "456789\nab\nread-only\nwrite-only\n";
    let bundle = world.bundle().sh(script);
    let out = run(&world, &bundle, "3").descriptors(open()).output().ok();
    assert_eq!(out.stdout(), expected, "{}", out.stderr());
    let text = |path: &Path| fs::read_to_string(path).unwrap();
    assert_eq!(text(&append), "one\ntwo\nthree\n");
    // How much `head` has read ahead is its own affair, so it is written at the end.
    assert!(text(&both).starts_with("ab"), "{}", text(&both));
    assert!(text(&both).contains("XY\n"), "{}", text(&both));
    assert_eq!(text(&read), "0123456789");
    let container = sleeping(&world);
    for _ in 0..2 {
        let call = container.exec_call(["--preserve-fds", "3"], ["/bin/sh", "-c", script]);
        let out = call.descriptors(open()).output().ok();
        assert_eq!(out.stdout(), expected, "{}", out.stderr());
    }
    assert_eq!(
        text(&append),
        "one\n".to_owned() + &"two\nthree\n".repeat(3)
    );
}

/// With `create` it is the stand-in, or runc's own process, that has them afterwards.
#[test]
fn a_created_container_keeps_them_until_it_ends() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("read line <&3; echo \"<$line>\" >&4; sleep 1000");
    let (read, mut to_it) = pipe().unwrap();
    let (mut from_it, write) = pipe().unwrap();
    let call = world
        .call(["create", "--preserve-fds=2", "--pid-file"])
        .arg(world.pid_file("c"))
        .arg("--bundle")
        .arg(bundle.path())
        .arg(world.id("c"));
    let call = call.descriptors([read.into(), write.into()]);
    let _ = call
        .output_to(world.output_file("o"), world.output_file("e"))
        .output()
        .ok();
    let container = Container::adopt(&world, "c");
    container.start();
    to_it.write_all(b"line\n").unwrap();
    let mut answer = [0; 7];
    from_it.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"<line>\n");
    let _ = container.kill("KILL").ok();
    assert_eq!(container.exit_code(), 137);
    assert_eq!(rest_of(from_it), "");
    wait_until("a broken pipe", SHORT, || to_it.write_all(b"x").is_err());
}

#[test]
fn a_detached_exec_keeps_them_until_it_ends() {
    let world = World::new();
    let container = sleeping(&world);
    let (read, mut to_it) = pipe().unwrap();
    let (from_it, write) = pipe().unwrap();
    let script = "cat <&3 >&4; exit 4";
    let pid = exec_detached(&container, script, vec![read.into(), write.into()]);
    to_it.write_all(b"through it").unwrap();
    drop(to_it);
    assert_eq!(rest_of(from_it), "through it");
    assert_eq!(reaper::wait(pid, SHORT).unwrap().code(), Some(4));
}

/// The number is of those that are there: a descriptor the runtime opens for itself
/// must not be taken for one.
#[test]
fn what_is_not_there_cannot_be_preserved() {
    let world = World::new();
    let null = || -> OwnedFd { File::open("/dev/null").unwrap().into() };
    let bundle = world.bundle().sh("exit 0");
    let out = run(&world, &bundle, "50").descriptors([null()]).output();
    // How many runc finds depends on what it has open itself.
    let said = out.exits_with(1).stderr();
    assert!(said.contains("unable to stat preserved-fd "), "{said}");
    assert!(said.contains(" (of 50): stat /proc/self/fd/"), "{said}");
    assert!(said.contains(": no such file or directory"), "{said}");
    let container = sleeping(&world);
    let _ = container
        .exec_sh(&["--preserve-fds", "50"], "exit 0")
        .fails_with(255, "unable to stat preserved-fd ");
}

/// Socket activation: systemd's descriptors come first.
fn activated(call: Invocation, pid: &str) -> Invocation {
    let words = call.words();
    let script = format!("export LISTEN_FDS=1 LISTEN_PID={pid}; exec \"$@\"");
    let mut shell = call.replaced_by(Path::new("/bin/sh"));
    shell = shell.args(["-c", &script, "sh"]);
    shell.args(words)
}

fn written(text: &str) -> PipeReader {
    let (read, mut write): (PipeReader, PipeWriter) = pipe().unwrap();
    write.write_all(text.as_bytes()).unwrap();
    read
}

#[test]
fn systemds_descriptors_come_before_the_preserved_ones() {
    let world = World::new();
    let script = "cat <&3; cat <&4; echo $LISTEN_FDS $LISTEN_PID";
    let bundle = world.bundle().sh(script);
    let pipes = || [written("systemd ").into(), written("preserved ").into()];
    let call = activated(run(&world, &bundle, "1"), "$$").descriptors(pipes());
    assert_eq!(call.output().ok().stdout(), "systemd preserved 1 1\n");
    // They are another process's.
    let call = activated(run(&world, &bundle, "2"), "1").descriptors(pipes());
    assert_eq!(call.output().ok().stdout(), "systemd preserved \n");
}

#[test]
fn an_exec_takes_no_notice_of_systemd() {
    let world = World::new();
    let container = sleeping(&world);
    let script = "cat <&3; echo $LISTEN_FDS $LISTEN_PID";
    let call = container.exec_call(["--preserve-fds", "1"], ["/bin/sh", "-c", script]);
    let call = activated(call, "$$").descriptors([written("first ").into()]);
    assert_eq!(call.output().ok().stdout(), "first \n");
}
