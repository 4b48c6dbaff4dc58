//! `exec` with a terminal: over the console socket, and the caller's own.

use kuasar_runv_test_harness::{Container, SHORT, Screen, World, json, reaper, screen};

use crate::tty::screen_of_call;

fn sleeping(world: &World) -> Container<'_> {
    world.start(&world.bundle().sh("sleep 1000"), "c")
}

/// A detached exec with a terminal; its screen and its pid.
fn exec_detached(world: &World, container: &Container<'_>, script: &str) -> (Screen, i32) {
    let pid_file = world.pid_file("e");
    let screen = screen_of_call(world, |socket| {
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
    let mut screen = screen_of_call(&world, |socket| {
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

#[test]
fn in_the_foreground_the_callers_terminal_is_used() {
    let world = World::new();
    let container = sleeping(&world);
    // runc sets the size a little after the start.
    let script = "sleep 0.5; stty size; trap 'stty size' WINCH; trap 'echo interrupted' INT
        echo ready
        until read line; do :; done; echo \"read <$line>\"; exit 8";
    let (mut screen, slave) = Screen::open(33, 99);
    let call = container.exec_call(["-t"], ["/bin/sh", "-c", script]);
    let running = screen::spawn_on(&slave, &[0, 1, 2], call);
    screen.expect("33 99\r\n");
    screen.expect("ready\r\n");
    screen.resize(21, 77);
    screen.expect("21 77\r\n");
    screen.write("\x03");
    screen.expect("interrupted\r\n");
    screen.write("line\r");
    screen.expect("read <line>\r\n");
    let _ = running.wait().exits_with(8);
    assert!(screen::is_cooked(&slave), "still raw");
}

#[test]
fn redirected_output_has_no_carriage_returns() {
    let world = World::new();
    let container = sleeping(&world);
    let (_screen, slave) = Screen::open(33, 99);
    let script = "tty; read line; echo \"<$line>\"";
    let call = container.exec_call(["-t"], ["/bin/sh", "-c", script]);
    // The terminal is found at stderr.
    let running = screen::spawn_on(&slave, &[2], call.stdin_bytes("x\n"));
    let out = running.wait().ok().stdout();
    // The echo comes before or after the first line.
    let expected = ["x\n/dev/pts/0\n<x>\n", "/dev/pts/0\nx\n<x>\n"];
    assert!(expected.contains(&out.as_str()), "{out:?}");
}
