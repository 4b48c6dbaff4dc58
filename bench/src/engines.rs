//! `true` in a container of podman and of `ctr`, with kuasar-runv and with runc; with
//! `KUASAR_RUNV_TEST_TEMPLATES`, a directory of templates, in machines of a template too.
//!
//! The engines run in the private world of `integration/`, whose scripts answer the
//! requests of this program one at a time, so that the boot of a bare VM, runc and
//! kuasar-runv alternate within each round.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use kuasar_runv_test_harness::{Flavour, Runtime, World, reaper};

use crate::floor::AnyFloor;
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
    let floor = AnyFloor::learn(&world);
    let (mut rows, mut verdicts) = (Vec::new(), Vec::new());
    for (name, title) in ENGINES {
        let mut engine = Engine::start(name);
        let mut requests = vec!["runc", "kuasar-runv"];
        if std::env::var_os("KUASAR_RUNV_TEST_TEMPLATES").is_some() {
            requests.push("template");
        }
        let mut floors = Samples::default();
        let mut samples: Vec<Samples> = requests.iter().map(|_| Samples::default()).collect();
        for round in 0..=rounds {
            eprint!("{name}: round {round} of {rounds}:");
            let bare = floor.boot().as_secs_f64();
            let cost: Vec<f64> = requests.iter().map(|what| engine.run(what)).collect();
            // The report comes after all engines, minutes later.
            eprint!(" floor {bare:.2}");
            for (what, seconds) in requests.iter().zip(&cost) {
                eprint!(", {what} {seconds:.2}");
            }
            eprintln!(" s");
            // The first round only warms up.
            if round > 0 {
                floors.add(bare);
                for (samples, seconds) in samples.iter_mut().zip(cost) {
                    samples.add(seconds);
                }
            }
        }
        engine.end();
        let (runc, bare) = (samples[0].median(), floors.median());
        rows.push(Row::new(format!("floor beside {name}"), "s", floors));
        for (what, samples) in requests.into_iter().zip(samples) {
            let ours = samples.median();
            if what != "runc" {
                verdicts.push(Verdict {
                    name: format!("{title}, ({what} - floor) / runc"),
                    value: (ours - bare) / runc,
                    unit: "",
                    target: Target::AtMost(TARGET),
                });
            }
            rows.push(Row::new(format!("{title}, {what}"), "s", samples));
        }
    }
    Section {
        title: "Engines: a container of `true`".into(),
        rows,
        verdicts,
    }
}
