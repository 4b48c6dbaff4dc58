//! `exec` of `true` in one running container: the whole call, the guest's part of it,
//! and runc's; then a hundred at once.
//!
//! The guest's part is measured by the agent, from the arrival of the request to the
//! end of the process. The sandboxer logs it in a container that was made with
//! `--debug`.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::{CALL, Container, Flavour, Runtime, SHORT, World, wait_until};

use crate::report::{Row, Section, Target, Verdict};
use crate::sample::Samples;

/// Most milliseconds of an exec that may pass outside the guest, and most times the
/// guest's.
const MOST_OUTSIDE: f64 = 10.0;
const MOST_RATIO: f64 = 2.0;

const AT_ONCE: usize = 100;

/// How the sandboxer's line about an exec begins, before the microseconds.
const TRACE: &str = "trace-guest exec ";

pub fn measure(rounds: u32) -> Section {
    let ours = World::with(Runtime::built(), Flavour::Source);
    let container = start(&ours, &["--debug"]);
    let log = ours
        .root
        .join("sandboxes")
        .join(&container.id)
        .join("sandboxer.log");
    let runc = PathBuf::from("/usr/sbin/runc");
    let peer = runc
        .exists()
        .then(|| World::with(Runtime::at(runc), Flavour::Source));
    let of_peer = peer.as_ref().map(|world| start(world, &[]));

    let mut samples = [(); 4].map(|()| Samples::default());
    let [total, inside, outside, of_runc] = &mut samples;
    for round in 0..=rounds {
        let elapsed = call(&container);
        let guest = last_trace(&log, round as usize + 1);
        let peer_elapsed = of_peer.as_ref().map(call);
        // The first round only warms up.
        if round == 0 {
            continue;
        }
        total.add(elapsed);
        inside.add(guest);
        outside.add(elapsed - guest);
        if let Some(elapsed) = peer_elapsed {
            of_runc.add(elapsed);
        }
    }
    let (elapsed, failed) = many(&container);
    let verdict = |name: &str, value, unit, target| Verdict {
        name: name.to_owned(),
        value,
        unit,
        target,
    };
    let mut verdicts = vec![
        verdict(
            "exec, outside the guest",
            outside.median(),
            "ms",
            Target::AtMost(MOST_OUTSIDE),
        ),
        verdict(
            "exec, outside / inside the guest",
            outside.median() / inside.median(),
            "",
            Target::AtMost(MOST_RATIO),
        ),
        verdict(
            "of a hundred exec at once, failed",
            failed,
            "",
            Target::AtMost(0.0),
        ),
    ];
    if of_runc.len() > 0 {
        let value = total.median() / of_runc.median();
        verdicts.push(verdict("exec, kuasar-runv / runc", value, "", Target::None));
    }
    let [total, inside, outside, of_runc] = samples;
    let mut rows = vec![
        Row::new("exec true", "ms", total),
        Row::new("  inside the guest", "ms", inside),
        Row::new("  outside the guest", "ms", outside),
    ];
    if of_runc.len() > 0 {
        rows.push(Row::new("runc exec true", "ms", of_runc));
    }
    rows.push(Row::new(
        "a hundred exec at once",
        "ms",
        [elapsed].into_iter().collect(),
    ));
    Section {
        title: "Exec: one running container".into(),
        rows,
        verdicts,
    }
}

/// Starts a container that only sleeps, with these global flags.
fn start<'w>(world: &'w World, flags: &[&str]) -> Container<'w> {
    let bundle = world.bundle().args(["sleep", "1000"]);
    let call = world.call(flags).args(["create", "--bundle"]);
    let call = call.arg(bundle.path()).arg("--pid-file");
    let call = call.arg(world.pid_file("c")).arg(world.id("c"));
    let files = (world.output_file("c.stdout"), world.output_file("c.stderr"));
    let _ = call.output_to(files.0, files.1).output().ok();
    let container = Container::adopt(world, "c");
    container.start();
    container
}

/// Milliseconds from the spawn of the command to its end.
fn call(container: &Container<'_>) -> f64 {
    let call = container.exec_call::<&str, _>([], ["true"]);
    let started = Instant::now();
    let out = call.output();
    let elapsed = started.elapsed();
    let _ = out.ok();
    milliseconds(elapsed)
}

/// What the guest needed for the exec with this number, in milliseconds.
fn last_trace(log: &Path, number: usize) -> f64 {
    let traces = || -> Vec<f64> {
        let text = fs::read_to_string(log).unwrap();
        let values = text.lines().filter_map(|line| line.split_once(TRACE));
        values
            .map(|(_, value)| value.trim_end_matches('"').parse::<f64>().unwrap() / 1000.0)
            .collect()
    };
    // The event may come after the end of the command.
    wait_until("the guest's report", SHORT, || traces().len() >= number);
    traces()[number - 1]
}

/// Milliseconds that a hundred of them took, and how many failed.
fn many(container: &Container<'_>) -> (f64, f64) {
    let started = Instant::now();
    let failed = thread::scope(|scope| {
        let calls: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                let call = container.exec_call::<&str, _>([], ["true"]).deadline(CALL);
                scope.spawn(move || call.output().code() != 0)
            })
            .collect();
        let ended = calls.into_iter().map(|call| call.join().unwrap_or(true));
        ended.filter(|failed| *failed).count()
    });
    (milliseconds(started.elapsed()), failed as f64)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
