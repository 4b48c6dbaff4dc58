//! What connects a process with its stand-in: its standard streams, its terminal,
//! its preserved descriptors, and the control connection.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kuasar_runv_protocol::stream::Kind;

use super::Containers;
use super::preserved::Ours;
use crate::cgroup::oom::OomWatch;
use crate::process::Process;
use crate::streams::{
    OutputEnd, StreamId, relay_input, relay_output, relay_socket, relay_terminal_input,
    relay_terminal_output, serve_control,
};
use crate::sys;

/// Capacity of stdio pipes, in bytes; the default of the kernel is 64 KiB. For who
/// writes much at a time it is eight times as much in our kernel (pipe-large-buffers.patch),
/// and what is in them is charged to the container.
const PIPE_SIZE: libc::c_int = 512 * 1024;

/// The agent's ends of a process's stdio pipes.
#[derive(Default)]
pub(super) struct Pipes {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// The agent's ends of everything a process gets.
pub(super) struct Stdio {
    pub pipes: Pipes,
    /// Those of its preserved descriptors that the host connects, with the place of
    /// each.
    pub preserved: Vec<(u8, Ours)>,
    pub oom: Option<Arc<OomWatch>>,
    /// See `output_outlives_process` of agent.proto.
    pub outlives_process: bool,
}

impl Pipes {
    /// Makes the announced ones; the process's ends come in the order of their numbers.
    pub(super) fn make(announced: [bool; 3]) -> io::Result<(Pipes, Vec<OwnedFd>)> {
        let mut ours = Pipes::default();
        let mut theirs = Vec::new();
        for (number, announced) in announced.into_iter().enumerate() {
            if !announced {
                continue;
            }
            let (read, write) = sys::pipe()?;
            sys::set_pipe_size(&read, PIPE_SIZE);
            let (mine, other) = match number {
                0 => (write, read),
                _ => (read, write),
            };
            theirs.push(other);
            match number {
                0 => ours.stdin = Some(mine),
                1 => ours.stdout = Some(mine),
                _ => ours.stderr = Some(mine),
            }
        }
        Ok((ours, theirs))
    }
}

impl Containers {
    /// Starts the tasks that connect a process with its stand-in.
    pub(super) fn attach_streams(
        &self,
        id: &str,
        exec_id: &str,
        process: &Arc<Process>,
        stdio: Stdio,
    ) {
        // Whether there is a terminal is in the spec, which the helper reads.
        let pipes = match process.terminal() {
            Some(_) => Pipes::default(),
            None => stdio.pipes,
        };
        let stream = |kind| {
            let streams = Arc::clone(&self.streams);
            let (container_id, exec_id) = (id.to_owned(), exec_id.to_owned());
            async move {
                let id = StreamId {
                    container_id,
                    exec_id,
                    kind,
                };
                streams.claim(id).await
            }
        };
        let exit = || process.exit();
        let output_end = || OutputEnd::new(process.exit(), stdio.outlives_process);
        let mut inputs: Vec<_> = pipes.stdin.map(|p| (p, Kind::Stdin)).into_iter().collect();
        let outputs = [(pipes.stdout, Kind::Stdout), (pipes.stderr, Kind::Stderr)];
        let mut outputs: Vec<_> = outputs
            .into_iter()
            .filter_map(|(pipe, kind)| Some((pipe?, kind)))
            .collect();
        for (index, ours) in stdio.preserved {
            let kind = Kind::Preserved(index);
            match ours {
                Ours::Input(pipe) => inputs.push((pipe, kind)),
                Ours::Output(pipe) => outputs.push((pipe, kind)),
                Ours::Socket(socket) => {
                    let (connection, end) = (stream(kind), output_end());
                    sys::spawn(async move {
                        if let Some(connection) = connection.await {
                            relay_socket(socket, connection, end).await;
                        }
                    });
                }
            }
        }
        for (pipe, kind) in inputs {
            let (connection, exit) = (stream(kind), exit());
            sys::spawn(async move {
                if let Some(connection) = connection.await {
                    relay_input(connection, pipe, exit).await;
                }
            });
        }
        for (pipe, kind) in outputs {
            let (connection, end) = (stream(kind), output_end());
            sys::spawn(async move {
                if let Some(connection) = connection.await {
                    relay_output(pipe, connection, end).await;
                }
            });
        }
        if let Some(terminal) = process.terminal() {
            let (input, exit_in, to) = (stream(Kind::Stdin), exit(), terminal.clone());
            sys::spawn(async move {
                if let Some(connection) = input.await {
                    relay_terminal_input(connection, to, exit_in).await;
                }
            });
            let (output, exit_out, from) = (stream(Kind::Stdout), exit(), terminal.clone());
            sys::spawn(async move {
                if let Some(connection) = output.await {
                    relay_terminal_output(from, connection, exit_out).await;
                }
            });
        }
        let (control, of) = (stream(Kind::Control), Arc::clone(process));
        sys::spawn(async move {
            if let Some(connection) = control.await {
                serve_control(connection, of, stdio.oom).await;
            }
        });
    }
}
