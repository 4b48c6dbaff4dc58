//! The processes a container consists of, to be killed.

use std::fs;
use std::path::{Path, PathBuf};

use kuasar_runv_test_harness::process::{self, Process};
use kuasar_runv_test_harness::world::hypervisor;
use kuasar_runv_test_harness::{SHORT, World, leaks, wait_until};

/// A kind of process that may die at any moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The hypervisor's process.
    Vm,
    Sandboxer,
    StandIn,
}

impl Victim {
    pub const ALL: [Victim; 3] = [Victim::Vm, Victim::Sandboxer, Victim::StandIn];

    fn is(self, process: &Process) -> bool {
        match self {
            Victim::Vm => is_machine(process),
            Victim::Sandboxer => has_word(process, "sandboxer"),
            Victim::StandIn => has_word(process, "standin"),
        }
    }
}

/// The built-in hypervisor is in the sandboxer.
fn is_machine(process: &Process) -> bool {
    match hypervisor().as_str() {
        "builtin" => has_word(process, "sandboxer"),
        _ => process.comm.starts_with("qemu-system"),
    }
}

fn has_word(process: &Process, word: &str) -> bool {
    process.command_line.split(' ').take(2).any(|w| w == word)
}

/// Live processes of this kind in this world.
pub fn find(world: &World, victim: Victim) -> Vec<i32> {
    leaks::processes(world.name())
        .iter()
        .filter(|p| victim.is(p))
        .map(|p| p.pid)
        .collect()
}

/// The one process of this kind.
#[track_caller]
pub fn the(world: &World, victim: Victim) -> i32 {
    let found = find(world, victim);
    let [pid] = found[..] else {
        let all: Vec<_> = leaks::processes(world.name())
            .iter()
            .map(Process::describe)
            .collect();
        panic!("one {victim:?}, not {found:?}, among:\n{}", all.join("\n"));
    };
    pid
}

/// Kills processes and waits until they are gone or zombies.
#[track_caller]
pub fn kill(pids: &[i32]) {
    for pid in pids {
        // One may have taken the next with it.
        let _ = process::signal(*pid, libc::SIGKILL);
    }
    wait_until("death of the killed", SHORT, || {
        pids.iter().all(|pid| !process::is_alive(*pid))
    });
}

/// Kills the hypervisor of one of several sandboxes.
#[track_caller]
pub fn kill_vm_of(world: &World, id: &str) {
    let record = world.root.join("sandboxes").join(id).join("sandbox.json");
    let text = std::fs::read(record).unwrap();
    let record: kuasar_runv_test_harness::Value = serde_json::from_slice(&text).unwrap();
    let machine = &record["vm"]["pid"];
    let pid = machine.as_i64().or(record["sandboxer"]["pid"].as_i64());
    let pid = pid.unwrap();
    kill(&[pid.try_into().unwrap()]);
}

/// A line of `/proc/PID/status`.
pub fn status(path: &Path, field: &str) -> String {
    let text = fs::read_to_string(path.join("status")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(field));
    let value = line.and_then(|l| l.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("no {field}")).trim().into()
}

pub fn proc_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

/// Names and effective capabilities of all threads; one may end meanwhile.
pub fn threads(pid: i32) -> Vec<(String, u64)> {
    let tasks = fs::read_dir(proc_of(pid).join("task")).unwrap();
    let mut threads: Vec<_> = tasks
        .filter_map(|task| {
            let path = task.ok()?.path();
            let name = fs::read_to_string(path.join("comm")).ok()?;
            let text = fs::read_to_string(path.join("status")).ok()?;
            let caps = text.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
            let caps = u64::from_str_radix(caps.trim(), 16).unwrap();
            Some((name.trim().to_owned(), caps))
        })
        .collect();
    threads.sort();
    threads
}
