//! `terminal: true`: the pty's master goes over the console socket.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use kuasar_runv_test_harness::{Bundle, CALL, Container, Invocation, SHORT, World, json};

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

/// The engine's end of a terminal.
pub struct Screen {
    master: File,
    chunks: Receiver<Vec<u8>>,
    seen: String,
}

impl Screen {
    pub fn new(master: File) -> Screen {
        let (sender, chunks) = channel();
        let mut reader = master.try_clone().unwrap();
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            // The master reports EIO when the last slave is closed.
            while let Ok(n @ 1..) = reader.read(&mut chunk) {
                if sender.send(chunk[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Screen {
            master,
            chunks,
            seen: String::new(),
        }
    }

    /// Runs a call that sends its terminal to the console socket, which it gets as
    /// its last argument so far.
    pub fn of_call(world: &World, call: impl FnOnce(&Path) -> Invocation) -> Screen {
        let socket = world.path("console.sock");
        // A test may run several calls.
        drop(std::fs::remove_file(&socket));
        let listener = UnixListener::bind(&socket).unwrap();
        let accepted = thread::spawn(move || receive_descriptor(&listener.accept().unwrap().0));
        // With a terminal nothing may keep the pipes of the call open.
        let _ = call(&socket).deadline(CALL).output().ok();
        Screen::new(accepted.join().unwrap())
    }

    pub fn write(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    #[track_caller]
    pub fn expect(&mut self, words: &str) {
        while !self.seen.contains(words) {
            let Ok(chunk) = self.chunks.recv_timeout(SHORT) else {
                panic!("{words:?} does not come; the screen shows {:?}", self.seen);
            };
            self.seen.push_str(&String::from_utf8_lossy(&chunk));
        }
    }

    pub fn resize(&self, rows: u16, cols: u16) {
        let size = libc::winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads a winsize that outlives the call.
        let rc = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
        assert_eq!(rc, 0, "TIOCSWINSZ: {}", std::io::Error::last_os_error());
    }
}

struct Terminal<'w> {
    container: Container<'w>,
    screen: Screen,
}

impl<'w> Terminal<'w> {
    fn create(world: &'w World, bundle: Bundle) -> Terminal<'w> {
        let bundle = bundle.with(|c| c["process"]["terminal"] = json!(true));
        let screen = Screen::of_call(world, |socket| {
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

impl std::ops::Deref for Terminal<'_> {
    type Target = Screen;

    fn deref(&self) -> &Screen {
        &self.screen
    }
}

impl std::ops::DerefMut for Terminal<'_> {
    fn deref_mut(&mut self) -> &mut Screen {
        &mut self.screen
    }
}

#[test]
fn the_program_has_a_terminal_whose_master_comes_over_the_console_socket() {
    let world = World::new();
    let script = "tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo all three; ls -l /dev/console
        read line; echo \"read <$line>\"; exit 9";
    let mut terminal = Terminal::create(&world, world.bundle().sh(script));
    terminal.container.start();
    terminal.expect("/dev/pts/0\r\n");
    terminal.expect("all three\r\n");
    terminal.write("hello\n");
    terminal.expect("read <hello>\r\n");
    assert_eq!(terminal.container.exit_code(), 9);
}

#[test]
fn the_keyboard_interrupts_the_foreground_process() {
    let world = World::new();
    let script = "trap 'echo interrupted; exit 3' INT; echo ready; while :; do sleep 0.1; done";
    let mut terminal = Terminal::create(&world, world.bundle().sh(script));
    terminal.container.start();
    terminal.expect("ready");
    terminal.write("\x03");
    terminal.expect("interrupted");
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
    terminal.expect("30 90\r\n");
    terminal.expect("ready");
    terminal.resize(44, 111);
    terminal.expect("44 111\r\n");
    let _ = terminal.container.kill("KILL").ok();
    assert_eq!(terminal.container.exit_code(), 137);
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
    let call = world
        .call(["create", "--console-socket"])
        .arg(world.path("missing.sock"));
    let call = call.arg("--bundle").arg(bundle.path()).arg(world.id("c"));
    let _ = call.output().fails_about(1, "no such file or directory");
    world.assert_clean();
}
