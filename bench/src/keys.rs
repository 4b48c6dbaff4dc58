//! How long a key takes to come back: typed at the terminal of `run`, echoed by the
//! terminal of the container, or by a program on it, and shown.
//!
//! The path of a key in kuasar-runv: pty, stand-in, vsock device, guest kernel,
//! agent, the container's pty, and back. In runc: pty, runc, the container's pty.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::screen::{Screen, spawn_on};
use kuasar_runv_test_harness::{Flavour, Runtime, SHORT, World, json};

use crate::commands::installed;
use crate::report::{Row, Section, Target, Verdict};
use crate::sample::Samples;

/// Far below what a person typing would notice, in milliseconds.
const TARGET_P99: f64 = 20.0;

/// What the container runs, and who echoes then.
const ECHOES: [(&str, &str); 2] = [
    ("echo by the terminal", "echo ready; exec cat >/dev/null"),
    ("echo by a program", "stty raw -echo; echo ready; exec cat"),
];

pub fn measure(rounds: u32) -> Section {
    let mut rows = Vec::new();
    let mut verdicts = Vec::new();
    let runtimes = [Some(Runtime::built()), installed("runc")];
    for runtime in runtimes.into_iter().flatten() {
        let name = if runtime.is_ours {
            "kuasar-runv"
        } else {
            "runc"
        };
        let is_ours = runtime.is_ours;
        let world = World::with(runtime, Flavour::Source);
        for (echo, script) in ECHOES {
            eprint!("\rkeys: {name}, {echo}      ");
            let times = round_trips(&world, script, rounds);
            for (percentile, target) in [(50, Target::None), (99, Target::AtMost(TARGET_P99))] {
                verdicts.push(Verdict {
                    name: format!("{name}, {echo}, p{percentile}"),
                    value: times.percentile(percentile),
                    unit: "ms",
                    target: if is_ours { target } else { Target::None },
                });
            }
            rows.push(Row::new(format!("{name}, {echo}"), "ms", times));
        }
    }
    eprintln!();
    Section {
        title: "Keys: one key typed at `run` until it is shown".into(),
        rows,
        verdicts,
    }
}

fn round_trips(world: &World, script: &str, rounds: u32) -> Samples {
    let bundle = world
        .bundle()
        .sh(script)
        .with(|c| c["process"]["terminal"] = json!(true));
    let (mut master, slave) = Screen::pair(24, 80);
    let running = spawn_on(&slave, &[0, 1, 2], world.run_call(&bundle, "c"));
    wait_for(&mut master, b"ready");
    let mut samples = Samples::default();
    for round in 0..rounds + WARM_UP {
        // Each key differs from the one before.
        let key = b'a' + u8::try_from(round % 26).unwrap_or_default();
        let typed = Instant::now();
        master.write_all(&[key]).expect("the terminal is there");
        wait_for(&mut master, &[key]);
        if round >= WARM_UP {
            samples.add(typed.elapsed().as_secs_f64() * 1000.0);
        }
        // A person is slower; what a key has set in motion comes to rest.
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = world.call(["delete", "--force", &world.id("c")]).output();
    let _ = running.wait();
    samples
}

/// Keys before the measurement, while code is being translated and paged in.
const WARM_UP: u32 = 20;

/// Reads until these bytes have come.
fn wait_for(master: &mut File, wanted: &[u8]) {
    let end = Instant::now() + SHORT;
    let mut seen = Vec::new();
    let mut chunk = [0; 1024];
    while !seen.windows(wanted.len()).any(|bytes| bytes == wanted) {
        let mut poll = libc::pollfd {
            fd: master.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd that outlives the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 1000) };
        assert!(Instant::now() < end, "{wanted:?} does not come: {seen:?}");
        if ready > 0 {
            let n = master.read(&mut chunk).expect("the terminal is there");
            seen.extend_from_slice(&chunk[..n]);
        }
    }
}
