//! `true` in a container of podman and of `ctr`, with kuasar-runv and with runc.
//!
//! The engines run in the private world of `integration/`, whose scripts answer the
//! requests of this program one at a time, so that the boot of a bare VM, runc and
//! kuasar-runv alternate within each round.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::{Flavour, Runtime, World, reaper};

use crate::floor::Floor;
use crate::report::{Row, Section, Target, Verdict};
use crate::sample::Samples;

/// Most a container may take beside runc's, the boot of a bare VM taken off.
const TARGET: f64 = 1.3;

/// How long an engine's script may take to end it.
const END: Duration = Duration::from_secs(60);

/// The engine, and what is run.
const ENGINES: [(&str, &str); 2] = [
    ("podman", "podman run --rm"),
    ("containerd", "ctr run --rm"),
];

/// One engine's script, waiting for requests.
struct Engine {
    script: i32,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Engine {
    fn start(name: &str) -> Engine {
        let integration = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration");
        let mut command = Command::new(integration.join(name));
        command
            .arg("--timed")
            .env("RUNTIME", Runtime::built().binary)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // Whoever boots the floor collects all children.
        let script =
            reaper::spawn(&mut command).unwrap_or_else(|e| panic!("integration/{name}: {e}"));
        Engine {
            requests: script.stdin,
            answers: BufReader::new(script.stdout.expect("it is piped")),
            script: script.pid,
        }
    }

    /// Seconds that one container took.
    fn run(&mut self, runtime: &str) -> f64 {
        let requests = self.requests.as_mut().expect("open until the end");
        writeln!(requests, "{runtime}").expect("the script reads requests");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("text");
        answer
            .trim()
            .parse()
            .unwrap_or_else(|_| panic!("the container failed with {runtime}"))
    }

    fn end(mut self) {
        drop(self.requests.take());
        let status = reaper::wait(self.script, END).expect("the script cleans up in time");
        assert!(status.success(), "the script ended with {status}");
    }
}

pub fn measure(rounds: u32) -> Section {
    let world = World::with(Runtime::built(), Flavour::Source);
    let floor = Floor::learn(&world);
    let (mut rows, mut verdicts) = (Vec::new(), Vec::new());
    for (name, title) in ENGINES {
        let mut engine = Engine::start(name);
        let (mut floors, mut peers, mut ours) = Default::default();
        for round in 0..=rounds {
            eprint!("\r{name}: round {round} of {rounds} ");
            let begin = Instant::now();
            floor.boot();
            let cost = [
                begin.elapsed().as_secs_f64(),
                engine.run("runc"),
                engine.run("kuasar-runv"),
            ];
            // The first round only warms up.
            if round > 0 {
                for (samples, seconds) in [&mut floors, &mut peers, &mut ours].into_iter().zip(cost)
                {
                    Samples::add(samples, seconds);
                }
            }
        }
        eprintln!();
        engine.end();
        verdicts.push(Verdict {
            name: format!("{title}, (kuasar-runv - floor) / runc"),
            value: (ours.median() - floors.median()) / peers.median(),
            unit: "",
            target: Target::AtMost(TARGET),
        });
        rows.push(Row::new(format!("floor beside {name}"), "s", floors));
        rows.push(Row::new(format!("{title}, runc"), "s", peers));
        rows.push(Row::new(format!("{title}, kuasar-runv"), "s", ours));
    }
    Section {
        title: "Engines: a container of `true`".into(),
        rows,
        verdicts,
    }
}
