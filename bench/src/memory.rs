//! What the host's processes of one container occupy: the proportional set size
//! (proc(5), smaps), in which a page shared by n processes counts 1/n for each.

use std::fs;
use std::time::Duration;

use kuasar_runv_test_harness::process::Process;
use kuasar_runv_test_harness::{Flavour, Runtime, World, leaks};

use crate::report::{Row, Section, Target, Verdict};
use crate::sample::Samples;

/// Most of a stand-in and of a sandboxer, in MiB.
const STANDIN_TARGET: f64 = 1.0;
const SANDBOXER_TARGET: f64 = 12.0;

pub fn measure(rounds: u32) -> Section {
    let world = World::with(Runtime::built(), Flavour::Source);
    let (mut standin, mut sandboxer) = (Samples::default(), Samples::default());
    let mut hypervisor = Samples::default();
    for round in 1..=rounds {
        eprint!("\rmemory: round {round} of {rounds} ");
        let container = world.start(&world.bundle().sh("echo up; sleep 1000"), "c");
        container.wait_for_output("up");
        // What is given back after the start has been given back.
        std::thread::sleep(Duration::from_millis(300));
        standin.add(pss_mib(container.pid));
        for process in leaks::processes(world.name()) {
            if process.comm.starts_with("qemu-system") {
                hypervisor.add(pss_mib(process.pid));
            } else if is_sandboxer(&process) {
                sandboxer.add(pss_mib(process.pid));
            }
        }
        let _ = container.delete_force().ok();
    }
    eprintln!();
    let verdict = |name: &str, samples: &Samples, target| Verdict {
        name: name.into(),
        value: samples.median(),
        unit: "MiB",
        target: Target::AtMost(target),
    };
    Section {
        title: "Memory: proportional set size without the guest's memory".into(),
        verdicts: vec![
            verdict("stand-in", &standin, STANDIN_TARGET),
            verdict("sandboxer", &sandboxer, SANDBOXER_TARGET),
        ],
        rows: vec![
            Row::new("stand-in", "MiB", standin),
            Row::new("sandboxer", "MiB", sandboxer),
            Row::new("QEMU", "MiB", hypervisor),
        ],
    }
}

pub fn is_sandboxer(process: &Process) -> bool {
    process
        .command_line
        .split(' ')
        .take(2)
        .any(|word| word == "sandboxer")
}

/// Proportional set size in MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pss {
    /// All mappings but the guest's memory.
    pub own: f64,
    /// The guest's memory, which is a memfd.
    pub guest: f64,
}

fn pss_mib(pid: i32) -> f64 {
    pss(pid).own
}

/// Of a process.
pub fn pss(pid: i32) -> Pss {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))
        .unwrap_or_else(|e| panic!("smaps of process {pid}: {e}"));
    pss_of(&smaps)
}

fn pss_of(smaps: &str) -> Pss {
    let mut is_guest = false;
    let mut sum = Pss::default();
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or("");
        if let Some(key) = first.strip_suffix(':') {
            if key == "Pss" {
                let value = line
                    .split_whitespace()
                    .nth(1)
                    .and_then(|n| n.parse::<f64>().ok());
                let mib = value.expect("Pss is a number") / 1024.0;
                match is_guest {
                    true => sum.guest += mib,
                    false => sum.own += mib,
                }
            }
        } else {
            is_guest = line.contains("/memfd:");
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_counts_by_itself() {
        let smaps = "\
5581a2400000-5581a2600000 r-xp 00000000 08:01 1 /usr/bin/kuasar-runv
Size: 2048 kB
Pss: 300 kB
Pss_Dirty: 7 kB
7f0000000000-7f0020000000 rw-s 00000000 00:01 5 /memfd:memory-backend-memfd (deleted)
Pss: 2048 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
Pss: 12 kB";
        let expected = Pss {
            own: 312.0 / 1024.0,
            guest: 2.0,
        };
        assert_eq!(pss_of(smaps), expected);
    }
}
