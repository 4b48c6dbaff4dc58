//! `exec`: one more process in a container.
//!
//! ```text
//! command    checks, forks the stand-in, records it ── streams, ExecProcess ──▶ guest
//! stand-in        joins cgroups and namespaces, executes        │
//! command    ◀────────────── the program runs, or why not ──────┘
//!            hands the streams over, writes the pid file, waits or leaves
//! ```
//!
//! The stand-in sets itself up while the guest works. It gets the streams only when
//! the program runs, so that a failed exec takes nothing from its caller's stdin.
//! Whatever dies on the way, the control stream closes and the guest's process with
//! it.

pub mod process;

use std::path::PathBuf;

use kuasar_runv_protocol::agent::ExecProcessRequest;
use nix::pty::Winsize;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde_json::Value;

use super::console::Console;
use super::create::{stream_flags, trace, wanted_streams};
use super::execs::{self, ExecRecord};
use super::preserved::Preserved;
use super::run::{self, Outcome};
use super::state::{ContainerRecord, Status};
use super::terminal::{CallersTerminal, check_streams};
use super::{Error, check_id, context};
use crate::agent_client;
use crate::root::Root;
use crate::sandbox::{Guest, Sandbox};
use crate::standin::spawn::{self, Beside, StandIn};
use crate::standin::{ATTACHED, TERMINAL};
use crate::sys::process::ProcessRef;
use process::Source;

/// What `exec` is told on the command line.
#[derive(Debug)]
pub struct Options {
    pub id: String,
    pub process: Source,
    pub pid_file: Option<PathBuf>,
    pub console_socket: Option<PathBuf>,
    pub detach: bool,
    pub preserve_fds: u32,
    /// As runc's `--cgroup`, each time it is given.
    pub cgroups: Vec<String>,
    pub ignore_paused: bool,
}

/// Starts a process in a container, and unless detached waits for its end.
///
/// # Errors
/// See [`Error`]; there is no process then.
pub fn exec(root: &Root, options: &Options) -> Result<Outcome, Error> {
    trace("exec-begin");
    check_id(&options.id)?;
    let preserved = Preserved::take(options.preserve_fds, false)?;
    let record = ContainerRecord::read(root, &options.id)?;
    match record.status(root) {
        Status::Stopped => return Err(Error::ExecStopped),
        Status::Creating => return Err(Error::ExecCreating),
        Status::Paused if !options.ignore_paused => return Err(Error::ExecPaused),
        Status::Created | Status::Running | Status::Paused => {}
    }
    let mut process = options.process.load(&record.bundle)?;
    let terminal = process["terminal"] == Value::Bool(true);
    check_streams(terminal, options.detach, options.console_socket.is_some())?;
    let cgroup = sub_cgroup(&options.cgroups)?;
    let callers = match terminal && !options.detach {
        true => Some(CallersTerminal::take(&mut process)?),
        false => None,
    };
    // Before there is any other process or thread: they would take the signals.
    let signals = match options.detach {
        true => None,
        false => Some(run::all_signals()?),
    };
    let (console, slave) = match (terminal, options.detach) {
        (true, true) => {
            let (console, slave) =
                Console::open(console_size(&process)).map_err(context("making a terminal"))?;
            (Some(console), Some(slave))
        }
        _ => (None, None),
    };
    let guest = Guest::open(root, &record.sandbox_id)?;
    let of = record.standin.map(ProcessRef::pidfd).transpose();
    let of = of
        .map_err(context("watching the container's stand-in"))?
        .flatten()
        .ok_or(Error::ExecStopped)?;
    let standin = Started::new(spawn::spawn_beside(Beside {
        label: &options.id,
        of,
        cgroups: &record.cgroups,
        terminal: slave,
    })?)?;
    let on_record = execs::add(root, &options.id, standin.process)?;
    standin.of()?.release()?;
    let request = ExecProcessRequest {
        container_id: options.id.clone(),
        // Unique on this host until it reboots.
        exec_id: format!("{}.{}", standin.process.pid, standin.process.start_time),
        process_json: process.to_string().into_bytes(),
        ignore_paused: options.ignore_paused,
        cgroup,
        umask: current_umask(),
        plain_newlines: terminal && !options.detach,
        output_outlives_process: !options.detach,
        ..Default::default()
    };
    let mut flags = if terminal { TERMINAL } else { 0 };
    if !options.detach {
        flags |= ATTACHED;
    }
    let start = Start {
        guest: &guest,
        standin: &standin,
        request,
        flags,
        preserved: &preserved,
    };
    start_with_files(root, &record, start)?;
    // The stand-in has them; their other ends are to see when it closes them.
    drop(preserved);
    if let (Some(console), Some(socket)) = (console, &options.console_socket) {
        console
            .send(socket)
            .map_err(|source| Error::ConsoleSocket {
                path: socket.clone(),
                source,
            })?;
    }
    if let Some(path) = &options.pid_file {
        let pid = standin.process.pid.to_string();
        crate::sys::atomic_file::write(path, pid.as_bytes(), 0o644).map_err(|source| {
            Error::PidFile {
                path: path.clone(),
                source,
            }
        })?;
    }
    let raw = match callers.map(CallersTerminal::raw) {
        Some(raw) => Some(raw.map_err(context("setting the terminal to raw mode"))?),
        None => None,
    };
    let (process, standin) = standin.commit()?;
    let Some(signals) = signals else {
        leave(root, &options.id, on_record);
        return Ok(Outcome::Detached);
    };
    let code = run::wait(process, &signals, raw.as_ref())?;
    // While it is open, the stand-in knows that somebody looks after the terminal.
    drop((raw, standin));
    trace("exec-end");
    Ok(Outcome::Ended(code))
}

/// Leaves a detached exec. Its record stays until it has ended, so this is when
/// those of earlier ones are looked at.
fn leave(root: &Root, id: &str, on_record: ExecRecord) {
    on_record.keep();
    if let Err(e) = execs::running(root, id) {
        log::warn!("{e}");
    }
}

/// A stand-in until it is complete; dropped before, it is ended.
struct Started {
    /// `None` when it is complete.
    of: Option<StandIn>,
    process: ProcessRef,
}

impl Started {
    fn new(of: StandIn) -> Result<Started, Error> {
        let process = ProcessRef::of(of.pid).map_err(context("the stand-in"))?;
        Ok(Started {
            of: Some(of),
            process,
        })
    }

    fn of(&self) -> Result<&StandIn, Error> {
        self.of.as_ref().ok_or(Error::NotRunning)
    }

    fn commit(mut self) -> Result<(ProcessRef, StandIn), Error> {
        self.of()?.commit()?;
        let of = self.of.take().ok_or(Error::NotRunning)?;
        Ok((self.process, of))
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if self.of.is_none() {
            return;
        }
        // It is a child of this process, which has reaped none: the pid is its.
        let _ = self.process.signal(rustix::process::Signal::KILL);
        let _ = waitpid(Pid::from_raw(self.process.pid), None);
    }
}

/// As [`start_in_guest`], with the files among the preserved descriptors.
fn start_with_files(root: &Root, record: &ContainerRecord, start: Start<'_>) -> Result<(), Error> {
    if !start.preserved.has_files() {
        return start_in_guest(start);
    }
    let prefix = files_prefix(&start.request);
    let sandbox = Sandbox::open(root, &record.sandbox_id)?;
    // Until the guest has opened them.
    let _files = start.preserved.share(&sandbox, &record.id, &prefix)?;
    start_in_guest(start)
}

/// What the names of a process's files in the shared directory start with.
fn files_prefix(request: &ExecProcessRequest) -> String {
    format!("{}-", request.exec_id)
}

/// What a process is started with.
struct Start<'a> {
    guest: &'a Guest,
    standin: &'a Started,
    request: ExecProcessRequest,
    /// What the stand-in has to know besides the streams.
    flags: u8,
    preserved: &'a Preserved,
}

/// Lets the guest start the process and gives its streams to the stand-in.
fn start_in_guest(start: Start<'_>) -> Result<(), Error> {
    let Start {
        guest,
        standin,
        mut request,
        flags,
        preserved,
    } = start;
    let terminal = flags & TERMINAL != 0;
    let wanted = wanted_streams(terminal).with_preserved(&preserved.relayed());
    request.preserved = preserved.wanted(&request.container_id, &files_prefix(&request));
    request.stdin = wanted.stdin;
    request.stdout = wanted.stdout;
    request.stderr = wanted.stderr;
    // All of them at once; what the guest is told about them can come in any order.
    let agent = guest.start_agent()?;
    let opening = guest.start_streams(&request.container_id, &request.exec_id, wanted)?;
    let agent = guest.finish_agent(agent)?;
    trace("exec-connected");
    agent.exec_process(&request).map_err(|e| match e {
        agent_client::Error::Refused { message, .. } => Error::Process(message),
        other => Error::Agent(other),
    })?;
    trace("exec-started");
    let streams = guest.finish_streams(opening)?;
    let flags = flags | stream_flags(wanted, terminal);
    standin.of()?.wait_ready()?;
    standin.of()?.attach(flags, &streams, preserved.relays())?;
    trace("exec-attached");
    Ok(())
}

/// The one cgroup of `--cgroup`: the guest has one hierarchy, that of cgroup v2.
fn sub_cgroup(given: &[String]) -> Result<String, Error> {
    let Some(first) = given.first() else {
        return Ok(String::new());
    };
    let fields: Vec<_> = first.split(':').collect();
    Err(Error::Unsupported(match fields[..] {
        [_] if given.len() == 1 => return Ok(first.clone()),
        [_] => {
            format!("invalid --cgroup argument: {first} (missing <controller>: prefix)")
        }
        [controller, _] => format!(
            "unknown controller {controller} in SubCgroupPaths: the virtual machine has cgroup v2"
        ),
        _ => format!("invalid --cgroup argument: {first}"),
    }))
}

fn console_size(process: &Value) -> Option<Winsize> {
    let size = process.get("consoleSize")?;
    let cells = |key: &str| u16::try_from(size.get(key)?.as_u64()?).ok();
    Some(Winsize {
        ws_row: cells("height")?,
        ws_col: cells("width")?,
        ws_xpixel: 0,
        ws_ypixel: 0,
    })
}

/// This process's file mode creation mask, which an exec inherits as with runc.
fn current_umask() -> u32 {
    use rustix::fs::Mode;
    // It can only be read by setting it; there is no other thread.
    let mask = rustix::process::umask(Mode::empty());
    rustix::process::umask(mask);
    mask.bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sub_cgroup_has_no_controller() {
        let parse = |list: &[&str]| {
            sub_cgroup(&list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
                .map_err(|e| e.to_string())
        };
        assert_eq!(parse(&[]).unwrap(), "");
        assert_eq!(parse(&["a/b"]).unwrap(), "a/b");
        assert!(
            parse(&["cpu:a"])
                .unwrap_err()
                .contains("unknown controller cpu")
        );
        assert!(
            parse(&["a", "b"])
                .unwrap_err()
                .contains("missing <controller>")
        );
        assert!(parse(&["a:b:c"]).unwrap_err().contains("invalid --cgroup"));
    }
}
