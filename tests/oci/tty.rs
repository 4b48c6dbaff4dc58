//! `terminal: true`: the pty's master goes over the console socket.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use kuasar_runv_test_harness::{Bundle, CALL, Container, Invocation, Screen, World, json};

/// Receives one descriptor (SCM_RIGHTS) as conmon and the shim do.
fn receive_descriptor(stream: &UnixStream) -> File {
    let mut name = [0u8; 256];
    let mut control = [0u64; 8];
    let mut iov = libc::iovec {
        iov_base: name.as_mut_ptr().cast(),
        iov_len: name.len(),
    };
    // SAFETY: an all-zero msghdr is a valid value of the C struct.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: `message` points to buffers that outlive the call.
    let got = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    assert!(got >= 0, "recvmsg: {}", std::io::Error::last_os_error());
    // SAFETY: recvmsg filled `message`; the header is checked before its data is read.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        assert!(
            !header.is_null(),
            "no descriptor came over the console socket"
        );
        assert_eq!((*header).cmsg_type, libc::SCM_RIGHTS);
        let fd: RawFd = libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned();
        File::from_raw_fd(fd)
    }
}

/// Runs a call that sends a terminal to the console socket it is given.
pub fn screen_of_call(world: &World, call: impl FnOnce(&Path) -> Invocation) -> Screen {
    let socket = world.path("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let accepted = thread::spawn(move || receive_descriptor(&listener.accept().unwrap().0));
    // With a terminal nothing may keep the pipes of the call open.
    let _ = call(&socket).deadline(CALL).output().ok();
    Screen::new(accepted.join().unwrap())
}

struct Terminal<'w> {
    container: Container<'w>,
    screen: Screen,
}

impl<'w> Terminal<'w> {
    fn create(world: &'w World, bundle: Bundle) -> Terminal<'w> {
        let bundle = bundle.with(|c| c["process"]["terminal"] = json!(true));
        let screen = screen_of_call(world, |socket| {
            let call = world.call(["create", "--console-socket"]).arg(socket);
            let call = call.arg("--pid-file").arg(world.pid_file("c"));
            call.arg("--bundle").arg(bundle.path()).arg(world.id("c"))
        });
        Terminal {
            container: Container::adopt(world, "c"),
            screen,
        }
    }
}

#[test]
fn the_program_has_a_terminal_whose_master_comes_over_the_console_socket() {
    let world = World::new();
    let script = "tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo all three; ls -l /dev/console
        read line; echo \"read <$line>\"; exit 9";
    let mut terminal = Terminal::create(&world, world.bundle().sh(script));
    terminal.container.start();
    terminal.screen.expect("/dev/pts/0\r\n");
    terminal.screen.expect("all three\r\n");
    terminal.screen.write("hello\n");
    terminal.screen.expect("read <hello>\r\n");
    assert_eq!(terminal.container.exit_code(), 9);
}

#[test]
fn the_keyboard_interrupts_the_foreground_process() {
    let world = World::new();
    let script = "trap 'echo interrupted; exit 3' INT; echo ready; while :; do sleep 0.1; done";
    let mut terminal = Terminal::create(&world, world.bundle().sh(script));
    terminal.container.start();
    terminal.screen.expect("ready");
    terminal.screen.write("\x03");
    terminal.screen.expect("interrupted");
    assert_eq!(terminal.container.exit_code(), 3);
}

#[test]
fn a_new_window_size_reaches_the_program() {
    let world = World::new();
    let script = "trap 'stty size' WINCH; stty size; echo ready; while :; do sleep 0.1; done";
    let bundle = world.bundle().sh(script).with(|c| {
        c["process"]["consoleSize"] = json!({ "height": 30, "width": 90 });
    });
    let mut terminal = Terminal::create(&world, bundle);
    terminal.container.start();
    terminal.screen.expect("30 90\r\n");
    terminal.screen.expect("ready");
    terminal.screen.resize(44, 111);
    terminal.screen.expect("44 111\r\n");
    let _ = terminal.container.kill("KILL").ok();
    assert_eq!(terminal.container.exit_code(), 137);
}

/// What a client that goes away, or `podman attach` that is closed, leaves.
#[test]
fn closing_the_master_hangs_the_terminal_up() {
    let world = World::new();
    let script = "trap 'echo hung up >>/tmp/told' HUP; echo ready
        while read line; do :; done; echo end of file >>/tmp/told; exit 5";
    let bundle = world.bundle().sh(script);
    let told = bundle.rootfs().join("tmp/told");
    let mut terminal = Terminal::create(&world, bundle);
    terminal.container.start();
    terminal.screen.expect("ready");
    drop(terminal.screen);
    assert_eq!(terminal.container.exit_code(), 5);
    let told = std::fs::read_to_string(told).unwrap();
    assert_eq!(told, "hung up\nend of file\n");
}

#[test]
fn a_terminal_without_a_console_socket_is_refused_by_create() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("exit 0")
        .with(|c| c["process"]["terminal"] = json!(true));
    let _ = world
        .try_create(&bundle, "c")
        .fails_with(1, "console socket");
    world.assert_clean();
}

#[test]
fn a_console_socket_without_a_terminal_is_refused() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0");
    let socket = world.path("console.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let call = world.call(["create", "--console-socket"]).arg(&socket);
    let call = call.arg("--bundle").arg(bundle.path()).arg(world.id("c"));
    let _ = call.output().fails_with(1, "console socket");
    world.assert_clean();
}

#[test]
fn a_console_socket_that_does_not_exist_fails_create() {
    let world = World::new();
    let bundle = world
        .bundle()
        .sh("exit 0")
        .with(|c| c["process"]["terminal"] = json!(true));
    let socket = world.path("missing.sock");
    let call = world.call(["create", "--console-socket"]).arg(&socket);
    let call = call.arg("--bundle").arg(bundle.path()).arg(world.id("c"));
    let words = format!(
        "dial unix {}: connect: no such file or directory",
        socket.display()
    );
    let _ = call.output().fails_with(1, &words);
    world.assert_clean();
}
