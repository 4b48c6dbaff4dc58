//! `exec` with a terminal: over the console socket, and the caller's own.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;

use kuasar_runv_test_harness::{Container, SHORT, World, json, process, reaper};

use crate::tty::Screen;

fn sleeping(world: &World) -> Container<'_> {
    world.start(&world.bundle().sh("sleep 1000"), "c")
}

/// A detached exec with a terminal; its screen and its pid.
fn exec_detached(world: &World, container: &Container<'_>, script: &str) -> (Screen, i32) {
    let pid_file = world.pid_file("e");
    let screen = Screen::of_call(world, |socket| {
        let flags = ["--detach", "--tty", "--pid-file"].map(std::ffi::OsStr::new);
        let flags = flags.into_iter().chain([
            pid_file.as_os_str(),
            "--console-socket".as_ref(),
            socket.as_os_str(),
        ]);
        container.exec_call(flags, ["/bin/sh", "-c", script])
    });
    let pid = std::fs::read_to_string(pid_file).unwrap();
    (screen, pid.parse().unwrap())
}

#[test]
fn the_master_comes_over_the_console_socket() {
    let world = World::new();
    let container = sleeping(&world);
    let script = "tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo all three
        read line; echo \"read <$line>\"; exit 9";
    let (mut screen, pid) = exec_detached(&world, &container, script);
    screen.expect("/dev/pts/0\r\n");
    screen.expect("all three\r\n");
    screen.write("hello\n");
    screen.expect("read <hello>\r\n");
    assert_eq!(reaper::wait(pid, SHORT).unwrap().code(), Some(9));
}

#[test]
fn the_keyboard_and_the_window_reach_the_process() {
    let world = World::new();
    let container = sleeping(&world);
    let script = "trap 'stty size' WINCH; trap 'echo interrupted; exit 3' INT; echo ready
        while :; do sleep 0.1; done";
    let (mut screen, pid) = exec_detached(&world, &container, script);
    screen.expect("ready");
    screen.resize(44, 111);
    screen.expect("44 111\r\n");
    screen.write("\x03");
    screen.expect("interrupted");
    assert_eq!(reaper::wait(pid, SHORT).unwrap().code(), Some(3));
}

#[test]
fn the_size_of_the_process_file_is_there_from_the_start() {
    let world = World::new();
    let container = sleeping(&world);
    let file = world.path("process.json");
    let process = json!({
        "cwd": "/", "terminal": true, "consoleSize": { "height": 31, "width": 91 },
        "args": ["/bin/sh", "-c", "stty size; read line"], "env": ["PATH=/bin"],
    });
    std::fs::write(&file, process.to_string()).unwrap();
    let pid_file = world.pid_file("e");
    let mut screen = Screen::of_call(&world, |socket| {
        let words = ["--detach", "--process", "--pid-file", "--console-socket"];
        let [detach, process, pid, console] = words.map(std::ffi::OsStr::new);
        let (file, pid_file) = (file.as_os_str(), pid_file.as_os_str());
        let flags = [
            detach,
            process,
            file,
            pid,
            pid_file,
            console,
            socket.as_os_str(),
        ];
        container.exec_call::<_, &str>(flags, [])
    });
    screen.expect("31 91\r\n");
    screen.write("\n");
    let pid = std::fs::read_to_string(pid_file).unwrap().parse().unwrap();
    assert_eq!(reaper::wait(pid, SHORT).unwrap().code(), Some(0));
}

/// A pty of the test that is the terminal of the command.
fn open_pty() -> (File, OwnedFd) {
    let (mut master, mut slave) = (0, 0);
    let size = libc::winsize {
        ws_row: 33,
        ws_col: 99,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the descriptors are stored in live integers, the rest is read.
    let rc = unsafe {
        libc::openpty(
            &mut master,
            &mut slave,
            std::ptr::null_mut(),
            std::ptr::null(),
            &size,
        )
    };
    assert_eq!(rc, 0, "openpty: {}", std::io::Error::last_os_error());
    // SAFETY: openpty just made them.
    unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
}

#[test]
fn in_the_foreground_the_callers_terminal_is_used() {
    let world = World::new();
    let container = sleeping(&world);
    let script = "stty size; trap 'stty size' WINCH; trap 'echo interrupted' INT; echo ready
        until read line; do :; done; echo \"read <$line>\"; exit 8";
    let (master, slave) = open_pty();
    let mut call = container.exec_call(["-t"], ["/bin/sh", "-c", script]);
    let terminal = slave.as_raw_fd();
    // SAFETY: all of them are async-signal-safe and take integers.
    unsafe {
        call.command().pre_exec(move || {
            libc::setsid();
            libc::ioctl(terminal, libc::TIOCSCTTY, 0);
            for stdio in 0..3 {
                libc::dup2(terminal, stdio);
            }
            Ok(())
        });
    }
    let running = call.spawn();
    let mut screen = Screen::new(master.try_clone().unwrap());
    screen.expect("33 99\r\n");
    screen.expect("ready\r\n");
    screen.resize(21, 77);
    // The terminal is not that of the test's session: nobody else would say so.
    process::signal(running.pid, libc::SIGWINCH).unwrap();
    screen.expect("21 77\r\n");
    screen.write("\x03");
    screen.expect("interrupted\r\n");
    screen.write("line\r");
    screen.expect("read <line>\r\n");
    let _ = running.wait().exits_with(8);
    // The mode of the terminal is what it was.
    // SAFETY: an all-zero termios is a valid value, which tcgetattr fills.
    let mode = unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(slave.as_raw_fd(), &mut mode), 0);
        mode
    };
    assert_ne!(mode.c_lflag & libc::ICANON, 0, "still raw");
}
