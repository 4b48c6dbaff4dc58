//! Children as their parent, `ps` and `/proc` see them.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;

use super::super::log_pump::LogPump;
use super::*;

const DEADLINE: Duration = Duration::from_secs(10);

struct Ran {
    result: Result<ExitStatus, Error>,
    output: String,
}

fn run(program: &str, args: &[&str], fds: &[BorrowedFd<'_>]) -> Ran {
    run_recorded(program, args, fds, &mut |_| Ok(()))
}

fn run_recorded(
    program: &str,
    args: &[&str],
    fds: &[BorrowedFd<'_>],
    on_spawn: &mut dyn FnMut(i32) -> io::Result<()>,
) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let (mut pump, output) = LogPump::new(Some(&dir.path().join("log"))).unwrap();
    let working_dir = File::open(dir.path()).unwrap();
    let spawn = Spawn {
        program: Path::new(program),
        args: args.iter().map(OsString::from).collect(),
        working_dir: working_dir.as_fd(),
        output: output.as_fd(),
        fds,
        read_only: true,
    };
    let result = Process::spawn(&spawn, on_spawn).map(|mut process| {
        assert!(wait_readable(process.as_fd(), DEADLINE).unwrap());
        process.try_wait().unwrap().unwrap()
    });
    drop(output);
    pump.pump();
    let output = std::fs::read_to_string(dir.path().join("log")).unwrap();
    Ran { result, output }
}

/// Output of a busybox applet.
fn busybox(args: &[&str], fds: &[BorrowedFd<'_>]) -> String {
    let ran = run("/bin/busybox", args, fds);
    assert!(ran.result.unwrap().success(), "{}", ran.output);
    ran.output
}

#[test]
fn the_child_has_only_what_it_was_given() {
    let given = File::open("/etc/passwd").unwrap();
    let inheritable = File::open("/dev/zero").unwrap();
    rustix::io::fcntl_setfd(&inheritable, rustix::io::FdFlags::empty()).unwrap();
    let list = busybox(&["ls", "-l", "/proc/self/fd"], &[given.as_fd()]);
    for expected in [
        "0 -> /dev/null",
        "1 -> pipe:",
        "2 -> pipe:",
        "3 -> /etc/passwd",
    ] {
        assert!(list.contains(expected), "{expected} not in {list}");
    }
    // The fifth is the directory that `ls` reads.
    assert_eq!(
        list.lines().filter(|line| line.contains("root ")).count(),
        5,
        "{list}"
    );
    assert_eq!(busybox(&["env"], &[]), "");
}

#[test]
fn the_child_is_confined() {
    let status = busybox(&["cat", "/proc/self/status"], &[]);
    for expected in [
        "NoNewPrivs:\t1",
        "CapInh:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "SigBlk:\t0000000000000000",
        "Umask:\t0077",
    ] {
        assert!(status.contains(expected), "{expected} not in {status}");
    }
    let ignored = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:\t"));
    let ignored = u64::from_str_radix(ignored.unwrap(), 16).unwrap();
    // Rust ignores SIGPIPE, which the child must not inherit.
    assert_eq!(ignored & 1 << (libc::SIGPIPE - 1), 0);
}

#[test]
fn the_pid_is_recorded_before_the_program_runs() {
    let mut recorded = None;
    let ran = run_recorded("/bin/busybox", &["sh", "-c", "echo $$"], &[], &mut |pid| {
        let exe = std::fs::read_link(format!("/proc/{pid}/exe"))?;
        assert_eq!(exe, std::env::current_exe()?);
        recorded = Some(pid);
        Ok(())
    });
    assert!(ran.result.unwrap().success());
    assert_eq!(ran.output.trim(), recorded.unwrap().to_string());
}

#[test]
fn a_failed_record_leaves_no_process() {
    let mut pid = 0;
    let ran = run_recorded("/bin/busybox", &["echo", "ran"], &[], &mut |p| {
        pid = p;
        Err(io::ErrorKind::StorageFull.into())
    });
    assert!(matches!(ran.result, Err(Error::Record(_))));
    assert_eq!(ran.output, "");
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_program_that_cannot_be_executed_is_an_error_of_spawn() {
    let ran = run("/nonexistent/program", &[], &[]);
    let error = ran.result.unwrap_err().to_string();
    assert_eq!(
        error,
        "cannot start /nonexistent/program: execute: it does not exist"
    );
    assert!(run("/etc/passwd", &[], &[]).result.is_err());
}

#[test]
fn kill_ends_a_child_that_ignores_everything_else() {
    let dir = File::open("/").unwrap();
    let (_pump, output) = LogPump::new(None).unwrap();
    let spawn = Spawn {
        program: Path::new("/bin/busybox"),
        args: vec!["sleep".into(), "1000".into()],
        working_dir: dir.as_fd(),
        output: output.as_fd(),
        fds: &[],
        read_only: false,
    };
    let mut process = Process::spawn(&spawn, &mut |_| Ok(())).unwrap();
    assert_eq!(process.try_wait().unwrap(), None);
    assert_eq!(process.kill(DEADLINE).unwrap().signal(), Some(9));
    assert_eq!(process.kill(DEADLINE).unwrap().signal(), Some(9));

    let process = Process::spawn(&spawn, &mut |_| Ok(())).unwrap();
    let proc_dir = format!("/proc/{}", process.pid());
    drop(process);
    assert!(!Path::new(&proc_dir).exists());
}
