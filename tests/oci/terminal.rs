//! `run` with `terminal: true`: the caller's own terminal, as a person at a shell
//! uses it. `tty.rs` has the terminals of engines.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use kuasar_runv_test_harness::screen::{is_cooked, spawn_on};
use kuasar_runv_test_harness::{
    Bundle, Running, SHORT, Screen, World, json, process, reaper, wait_until,
};

/// `run` of a bundle at a terminal.
struct Session {
    screen: Screen,
    /// The test's own copy: the terminal stays when `run` is gone.
    slave: File,
    running: Running,
}

impl Session {
    fn start(world: &World, bundle: Bundle) -> Session {
        let bundle = with_terminal(bundle);
        let (screen, slave) = Screen::open(33, 101);
        assert!(is_cooked(&slave));
        let running = spawn_on(&slave, &[0, 1, 2], world.run_call(&bundle, "c"));
        Session {
            screen,
            slave,
            running,
        }
    }

    /// Waits for the end; the mode of the terminal must be back then.
    #[track_caller]
    fn end(self) -> i32 {
        let code = self.running.wait().code();
        assert!(is_cooked(&self.slave), "the terminal was left in raw mode");
        code
    }
}

/// Waits until `cat` repeats the line. The shell hands the terminal over at a moment
/// that nothing shows, and keys that come before it are the shell's.
#[track_caller]
fn answers(screen: &mut Screen, line: &str) {
    wait_until("an answer of the job in the foreground", SHORT, || {
        screen.write(&format!("{line}\r"));
        let twice = format!("{line}\r\n{line}\r\n");
        screen.shows_within(&twice, std::time::Duration::from_millis(500))
    });
}

fn with_terminal(bundle: Bundle) -> Bundle {
    bundle.with(|c| c["process"]["terminal"] = json!(true))
}

#[test]
fn the_program_is_at_the_callers_terminal() {
    let world = World::new();
    let script = "tty; stty size; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo all three
        read line; echo \"read <$line>\"; exit 9";
    let mut session = Session::start(&world, world.bundle().sh(script));
    session.screen.expect("/dev/pts/0\r\n");
    // The caller's, and from the first moment on.
    session.screen.expect("33 101\r\n");
    session.screen.expect("all three\r\n");
    assert!(
        !is_cooked(&session.slave),
        "keys are not passed as they are"
    );
    session.screen.write("hello\r");
    session.screen.expect("read <hello>\r\n");
    assert_eq!(session.end(), 9);
    world.assert_clean();
}

#[test]
fn a_new_size_of_the_callers_terminal_reaches_the_program() {
    let world = World::new();
    let script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.1; done";
    let mut session = Session::start(&world, world.bundle().sh(script));
    session.screen.expect("ready");
    session.screen.resize(44, 111);
    session.screen.expect("44 111\r\n");
    let _ = world.call(["kill", &world.id("c"), "KILL"]).output().ok();
    assert_eq!(session.end(), 137);
}

#[test]
fn jobs_are_stopped_continued_interrupted_and_ended_from_the_keyboard() {
    let world = World::new();
    let mut session = Session::start(&world, world.bundle().args(["/bin/sh", "-i"]));
    let screen = &mut session.screen;
    screen.expect("# ");
    screen.write("cat\r");
    answers(screen, "before");
    screen.write("\x1a");
    screen.expect("Stopped");
    screen.expect("# ");
    screen.write("jobs\r");
    screen.expect("Stopped");
    screen.expect("# ");
    screen.write("fg\r");
    answers(screen, "after");
    screen.write("\x03");
    screen.expect("# ");
    screen.write("echo status $?\r");
    screen.expect("status 130\r\n");
    screen.expect("# ");
    screen.write("(exit 4)\r");
    screen.expect("# ");
    screen.write("\x04");
    assert_eq!(session.end(), 4);
}

#[test]
fn the_mode_is_restored_after_a_signal_to_run() {
    let world = World::new();
    let script = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let mut session = Session::start(&world, world.bundle().sh(script));
    session.screen.expect("ready");
    process::signal(session.running.pid, libc::SIGTERM).unwrap();
    assert_eq!(session.end(), 3);
}

#[test]
fn the_mode_is_restored_when_the_program_cannot_be_executed() {
    let world = World::new();
    let session = Session::start(&world, world.bundle().args(["/no/such/program"]));
    assert_eq!(session.end(), 1);
    world.assert_clean();
}

#[test]
fn the_program_hears_when_the_caller_hangs_up() {
    let world = World::new();
    let script = "trap 'echo told >/tmp/told; exit 5' HUP; echo ready; while :; do sleep 0.1; done";
    let bundle = world.bundle().sh(script);
    let told = bundle.rootfs().join("tmp/told");
    let mut session = Session::start(&world, bundle);
    session.screen.expect("ready");
    drop((session.screen, session.slave));
    assert_eq!(session.running.wait().code(), 5);
    assert_eq!(std::fs::read_to_string(told).unwrap(), "told\n");
    world.assert_clean();
}

#[test]
fn without_any_terminal_run_says_so() {
    let world = World::new();
    let bundle = with_terminal(world.bundle().sh("exit 0"));
    let mut call = world.run_call(&bundle, "c");
    // SAFETY: setsid takes no arguments; it leaves the test's terminal, if any.
    unsafe {
        call.command().pre_exec(|| match libc::setsid() {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let _ = call
        .output()
        .fails_with(1, "open /dev/tty: no such device or address");
    world.assert_clean();
}

/// Redirected output goes where it was sent, and the keyboard still works.
#[test]
fn streams_can_be_redirected_beside_a_terminal() {
    let world = World::new();
    let bundle = with_terminal(world.bundle().sh("read line; echo \"got $line\""));
    let (mut screen, slave) = Screen::open(33, 101);
    let out = world.output_file("redirected");
    let fd = out.as_raw_fd();
    let mut call = world.run_call(&bundle, "c");
    // SAFETY: dup2 takes integers and is async-signal-safe.
    unsafe {
        call.command().pre_exec(move || match libc::dup2(fd, 1) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let running = spawn_on(&slave, &[0, 2], call);
    wait_until("raw mode", SHORT, || !is_cooked(&slave));
    screen.write("typed\r");
    assert_eq!(running.wait().code(), 0);
    let text = std::fs::read_to_string(world.path("redirected")).unwrap();
    // The keyboard's echo is output too. No carriage returns: it is a file.
    assert_eq!(text, "typed\ngot typed\n");
}

/// What comes from a file is typed; the terminal on the host adds the carriage returns.
#[test]
fn the_keyboard_can_be_redirected_beside_a_terminal() {
    let world = World::new();
    let script = "read line; echo \"got $line\"; mode=$(stty -a 2>/dev/null)
        for flag in $mode; do case $flag in *onlcr|*opost) echo $flag;; esac; done";
    let bundle = with_terminal(world.bundle().sh(script));
    let (mut screen, slave) = Screen::open(33, 101);
    let call = world.run_call(&bundle, "c").stdin_bytes("from a file\n");
    let running = spawn_on(&slave, &[1, 2], call);
    screen.expect("from a file\r\n");
    screen.expect("got from a file\r\nopost\r\n-onlcr\r\n");
    assert_eq!(running.wait().code(), 0);
}

/// A terminal emulator, so that what a person would see can be compared.
struct Tmux<'w> {
    socket: PathBuf,
    world: &'w World,
}

impl<'w> Tmux<'w> {
    /// A screen of 80 x 24 with `run` of a bundle on it.
    fn start(world: &'w World, bundle: &Bundle) -> Tmux<'w> {
        let tmux = Tmux {
            socket: world.path("tmux.sock"),
            world,
        };
        let mut call = world.run_call(bundle, "c");
        let run = call.command();
        let words: Vec<_> = std::iter::once(run.get_program())
            .chain(run.get_args())
            .map(|word| format!("'{}'", word.to_str().unwrap()))
            .collect();
        let envs: Vec<(String, String)> = run
            .get_envs()
            .filter_map(|(k, v)| Some((k.to_str()?.to_owned(), v?.to_str()?.to_owned())))
            .collect();
        // The exit code stays on the screen after the end.
        let line = format!("{}; echo ended with $?; sleep 1000", words.join(" "));
        let mut command = tmux.command(&["-f", "/dev/null", "new-session", "-d"]);
        command.args(["-x", "80", "-y", "24"]).arg(line).envs(envs);
        let (status, _) = output(command);
        assert!(status, "tmux does not start");
        tmux
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("tmux");
        command
            .env_clear()
            .env("TERM", "xterm")
            .env("PATH", "/usr/bin:/bin");
        command.arg("-S").arg(&self.socket).args(words);
        command
    }

    fn keys(&self, keys: &[&str]) {
        let mut command = self.command(&["send-keys"]);
        command.args(keys);
        assert!(output(command).0, "send-keys {keys:?}");
    }

    fn screen(&self) -> String {
        output(self.command(&["capture-pane", "-p"])).1
    }

    #[track_caller]
    fn wait_for(&self, what: &str, condition: impl Fn(&str) -> bool) {
        let mut last = String::new();
        let shown = kuasar_runv_test_harness::wait::holds_within(SHORT, || {
            last = self.screen();
            condition(&last)
        });
        assert!(shown, "{what} does not come; the screen shows:\n{last}");
    }
}

impl Drop for Tmux<'_> {
    fn drop(&mut self) {
        let _ = self
            .world
            .call(["delete", "--force", &self.world.id("c")])
            .output();
        let _ = output(self.command(&["kill-server"]));
    }
}

/// Runs a program of the host to its end: whether it succeeded, and its output.
fn output(mut command: Command) -> (bool, String) {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = reaper::spawn(&mut command).unwrap();
    let mut text = String::new();
    let mut stdout = child.stdout.take().unwrap();
    io::Read::read_to_string(&mut stdout, &mut text).unwrap();
    let status = reaper::wait(child.pid, SHORT);
    (status.is_some_and(|s| s.success()), text)
}

#[test]
fn vi_edits_a_file_on_the_whole_screen() {
    let world = World::new();
    let bundle = with_terminal(world.bundle().args(["/bin/vi", "/tmp/poem"]));
    let poem = bundle.rootfs().join("tmp/poem");
    std::fs::write(&poem, "roses are red\nviolets are blue\n").unwrap();
    let tmux = Tmux::start(&world, &bundle);
    tmux.wait_for("the file", |screen| {
        let lines: Vec<_> = screen.lines().collect();
        // Lines below the end of the file, and the status line at the bottom.
        lines.len() == 24
            && lines[0] == "roses are red"
            && lines[2..23].iter().all(|line| *line == "~")
            && lines[23].contains("/tmp/poem")
    });
    tmux.keys(&["j", "0", "c", "w", "tulips", "Escape"]);
    tmux.wait_for("the new word", |screen| {
        screen.lines().nth(1) == Some("tulips are blue")
    });
    tmux.keys(&[":wq", "Enter"]);
    tmux.wait_for("the end", |screen| screen.contains("ended with 0"));
    let text = std::fs::read_to_string(&poem).unwrap();
    assert_eq!(text, "roses are red\ntulips are blue\n");
}

#[test]
fn top_uses_the_whole_screen_and_follows_its_size() {
    let world = World::new();
    let bundle = with_terminal(world.bundle().args(["/bin/top", "-d", "1"]));
    let tmux = Tmux::start(&world, &bundle);
    let shows_top = |screen: &str| {
        let mut lines = screen.lines();
        lines.next().is_some_and(|line| line.starts_with("Mem:"))
            && screen.contains("PID  PPID USER")
            && screen.contains("/bin/top -d 1")
    };
    tmux.wait_for("the table", shows_top);
    let mut resize = tmux.command(&["resize-window", "-x", "100", "-y", "30"]);
    resize.stdin(Stdio::null());
    assert!(output(resize).0);
    tmux.wait_for("the table again", shows_top);
    tmux.keys(&["q"]);
    tmux.wait_for("the end", |screen| screen.contains("ended with 0"));
}
