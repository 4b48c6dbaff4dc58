//! A container from nothing to its end, beside the boot of a VM that does nothing.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use kuasar_runv_test_harness::{Bundle, Flavour, Runtime, World};

use crate::floor::Floor;
use crate::report::{Row, Section, Target, Verdict};
use crate::sample::{Cost, Samples, cost_of};

/// Most the runtime may cost beside the floor, in wall and CPU time.
const TARGET: f64 = 1.6;

const LINE: &str = "hello from the container\n";

#[derive(Default)]
struct Costs {
    wall: Samples,
    cpu: Samples,
}

impl Costs {
    fn add(&mut self, cost: Cost) {
        self.wall.add(cost.wall.as_secs_f64());
        self.cpu.add(cost.cpu.as_secs_f64());
    }
}

pub fn measure(rounds: u32) -> Section {
    let world = World::with(Runtime::built(), Flavour::Source);
    let floor = Floor::learn(&world);
    let bundle = world
        .bundle()
        .args(["/bin/busybox", "echo", LINE.trim_end()]);
    // The page cache is warm for both.
    floor.boot();
    run(&world, &bundle);
    let (mut floors, mut runs) = (Costs::default(), Costs::default());
    let mut steps = Breakdown::default();
    for round in 1..=rounds {
        eprint!("\rstart: round {round} of {rounds} ");
        floors.add(cost_of(|| floor.boot()));
        runs.add(cost_of(|| run(&world, &bundle)));
        steps.add(&world, &bundle);
    }
    eprintln!();
    let ratio = |name: &str, a: &Samples, b: &Samples| Verdict {
        name: format!("run / floor, {name}"),
        value: a.median() / b.median(),
        unit: "",
        target: Target::AtMost(TARGET),
    };
    let verdicts = vec![
        ratio("wall", &runs.wall, &floors.wall),
        ratio("CPU", &runs.cpu, &floors.cpu),
    ];
    let mut rows = vec![
        Row::new("floor, wall", "s", floors.wall),
        Row::new("floor, CPU", "s", floors.cpu),
        Row::new("run, wall", "s", runs.wall),
        Row::new("run, CPU", "s", runs.cpu),
    ];
    rows.extend(steps.rows());
    Section {
        title: "Start: a container that prints a line".into(),
        rows,
        verdicts,
    }
}

fn run(world: &World, bundle: &Bundle) {
    let out = world.run(bundle, "c").ok();
    assert_eq!(out.stdout(), LINE);
}

/// How long each step of `run --debug` takes, in milliseconds.
#[derive(Default)]
struct Breakdown {
    /// By the order in which the steps come in the first round.
    order: Vec<String>,
    steps: BTreeMap<String, Samples>,
}

impl Breakdown {
    fn add(&mut self, world: &World, bundle: &Bundle) {
        let log = world.path("trace.log");
        // From an earlier round; the first has none.
        let _ = fs::remove_file(&log);
        let started = monotonic();
        let call = world.call(["--debug", "--log-format", "json", "--log"]);
        let call = call.arg(&log).args(["run", "--bundle"]).arg(bundle.path());
        let _ = call.arg(world.id("c")).output().ok();
        let ended = monotonic();
        let text = fs::read_to_string(&log).expect("--debug writes a log");
        let mut times = trace_lines(&text);
        times.sort_by_key(|(_, at)| *at);
        times.push(("process-end".into(), ended));
        let mut before = started;
        for (name, at) in times {
            let step = at.saturating_sub(before);
            before = at;
            self.add_step(format!("  up to {name}"), step);
        }
        for (name, time) in guest_times(&text) {
            self.add_step(format!("  guest: {name}"), time);
        }
    }

    fn add_step(&mut self, name: String, time: Duration) {
        if !self.order.contains(&name) {
            self.order.push(name.clone());
        }
        self.steps
            .entry(name)
            .or_default()
            .add(time.as_secs_f64() * 1000.0);
    }

    fn rows(mut self) -> Vec<Row> {
        let names = std::mem::take(&mut self.order);
        names
            .into_iter()
            .filter_map(|name| Some(Row::new(name.clone(), "ms", self.steps.remove(&name)?)))
            .collect()
    }
}

/// Time of CLOCK_MONOTONIC, as the runtime's trace lines have it.
fn monotonic() -> Duration {
    // SAFETY: an all-zero timespec is a valid value of the C struct, which outlives
    // the call.
    let time = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time);
        time
    };
    // The clock counts up from the boot.
    let part = |value| u64::try_from(value).unwrap_or_default();
    Duration::from_secs(part(time.tv_sec)) + Duration::from_nanos(part(time.tv_nsec))
}

/// Lines `trace <step> <microseconds of CLOCK_MONOTONIC>`.
fn trace_lines(log: &str) -> Vec<(String, Duration)> {
    let parse = |line: &str| {
        let words = line.split_once("\"trace ")?.1.split('"').next()?;
        let (step, time) = words.split_once(' ')?;
        Some((step.to_owned(), Duration::from_micros(time.parse().ok()?)))
    };
    log.lines().filter_map(parse).collect()
}

/// The line `trace-guest agent-start <us> agent-ready <us>` of the guest's own clock,
/// which starts with its kernel.
fn guest_times(log: &str) -> Vec<(&'static str, Duration)> {
    let times = log.lines().find_map(|line| {
        let mut words = line.split_once("\"trace-guest ")?.1.split_whitespace();
        let mut value = |name: &str| {
            words.find(|w| *w == name)?;
            words.next()?.parse().ok().map(Duration::from_micros)
        };
        Some((value("agent-start")?, value("agent-ready")?))
    });
    times.map_or_else(Vec::new, |(start, ready)| {
        vec![
            ("kernel", start),
            ("agent until ready", ready.saturating_sub(start)),
        ]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_lines_are_found_between_others() {
        let log = r#"{"level":"debug","msg":"trace create-begin 1500","time":"x"}
{"level":"debug","msg":"other","time":"x"}
{"level":"debug","msg":"trace vmm-start 2500","time":"x"}
{"level":"debug","msg":"trace-guest agent-start 400 agent-ready 450 (us of the guest's clock)","time":"x"}"#;
        let us = Duration::from_micros;
        assert_eq!(
            trace_lines(log),
            [
                ("create-begin".to_owned(), us(1500)),
                ("vmm-start".to_owned(), us(2500))
            ]
        );
        assert_eq!(
            guest_times(log),
            [("kernel", us(400)), ("agent until ready", us(50))]
        );
    }
}
