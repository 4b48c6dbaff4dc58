//! `ps`: what runs in a container.
//!
//! As a table, the processes of the guest, told by its agent and laid out as
//! ps(1) of procps does it ([`options`], [`columns`]); as JSON, the host's
//! processes that stand for the container's own and for those of `exec`.

mod columns;
pub(super) mod options;

use std::collections::HashMap;

use kuasar_runv_protocol::agent::{ListProcessesResponse, ProcessInfo};
use kuasar_runv_protocol::{MAX_ARGS_LEN, MAX_PROCESSES};

use super::state::{ContainerRecord, Status};
use super::{Error as ContainerError, check_id, execs};
use crate::root::Root;
use crate::sandbox::Guest;
use columns::Facts;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("invalid format option")]
    Format,
    #[error("couldn't find PID field in ps output")]
    NoPid,
    #[error(
        "ps option {0:?} is not supported; supported are -e, -A, -a, -d, -f, -F, -l, -j, -w, -o, --no-headers and, without a dash, a, x, u, l, j, w, o"
    )]
    Option(String),
    #[error("unknown ps column {0:?}; known are {known}", known = columns::known())]
    Column(String),
    #[error("ps option {0:?} needs a list of columns")]
    NoList(String),
}

/// Longest name of a process that is shown, in bytes; the kernel's have 15.
const MAX_NAME: usize = 64;

/// The table, headers included.
///
/// # Errors
/// See [`Error`], and those of the agent.
pub fn table(root: &Root, id: &str, ps_options: &[String]) -> Result<String, ContainerError> {
    check_id(id)?;
    let record = ContainerRecord::read(root, id)?;
    let layout = options::parse(ps_options)?;
    if !layout.columns.iter().any(|column| column.header == "PID") {
        return Err(Error::NoPid.into());
    }
    let mut processes = Vec::new();
    let mut memory_kib = 0;
    if has_processes(record.status(root)) {
        let agent = Guest::open(root, &record.sandbox_id)?.agent()?;
        let listed = agent.list_processes(id).map_err(ContainerError::Agent)?;
        if listed.truncated {
            log::warn!("the container has more than {MAX_PROCESSES} processes; not all are shown");
        }
        memory_kib = listed.memory_kib;
        processes = checked(listed);
    }
    let facts = Facts::new(memory_kib, names("/etc/passwd"), names("/etc/group"));
    Ok(columns::render(&layout, &processes, &facts))
}

/// The pids on this host, `null` when there are none.
///
/// # Errors
/// When the container's records cannot be read.
pub fn json(root: &Root, id: &str) -> Result<String, ContainerError> {
    check_id(id)?;
    let record = ContainerRecord::read(root, id)?;
    let status = record.status(root);
    let mut pids: Vec<i32> = Vec::new();
    if has_processes(status) {
        pids.push(record.pid(status));
        pids.extend(execs::running(root, id)?.iter().map(|standin| standin.pid));
        pids.sort_unstable();
    }
    let list = pids
        .iter()
        .map(i32::to_string)
        .collect::<Vec<_>>()
        .join(",");
    Ok(match list.as_str() {
        "" => "null\n".to_owned(),
        list => format!("[{list}]\n"),
    })
}

fn has_processes(status: Status) -> bool {
    !matches!(status, Status::Creating | Status::Stopped)
}

/// What the guest says, bounded and printable.
fn checked(listed: ListProcessesResponse) -> Vec<ProcessInfo> {
    let mut processes = listed.processes;
    processes.truncate(MAX_PROCESSES);
    processes.iter_mut().for_each(make_printable);
    processes
}

/// As [`table`], of what a guest says.
#[cfg(any(test, fuzzing))]
pub fn table_of(listed: ListProcessesResponse, layout: &options::Layout) -> String {
    let facts = Facts::new(listed.memory_kib, HashMap::new(), HashMap::new());
    columns::render(layout, &checked(listed), &facts)
}

/// The guest's texts made fit for a terminal, and bounded.
fn make_printable(process: &mut ProcessInfo) {
    process.args.truncate(MAX_ARGS_LEN);
    let clean = |text: &str, max: usize| -> String {
        text.chars()
            .take(max)
            .map(|c| if c.is_control() { '?' } else { c })
            .collect()
    };
    process.name = clean(&process.name, MAX_NAME);
    process.state = clean(&process.state, 1);
    // Arguments are separated by NUL; ps puts spaces.
    let args = String::from_utf8_lossy(&process.args).replace('\0', " ");
    process.args = clean(&args, MAX_ARGS_LEN).into_bytes();
}

/// Names by id, of a file in the format of passwd(5) or group(5). Not by the C
/// library: the static binary must not load name service plugins.
fn names(path: &str) -> HashMap<u32, String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let mut names = HashMap::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        let (Some(name), Some(id)) = (fields.next(), fields.nth(1)) else {
            continue;
        };
        if let Ok(id) = id.parse() {
            names.entry(id).or_insert_with(|| name.to_owned());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_says_cannot_control_a_terminal() {
        let mut process = ProcessInfo {
            name: format!("\x1b[31m{}", "x".repeat(1000)),
            args: b"a\0b\x07\xff\0".to_vec(),
            state: "SSS".into(),
            ..ProcessInfo::new()
        };
        make_printable(&mut process);
        assert!(process.name.starts_with("?[31m"));
        assert_eq!(process.name.len(), MAX_NAME);
        assert_eq!(process.args, "a b?\u{fffd} ".as_bytes());
        assert_eq!(process.state, "S");
    }
}
