//! stdout of a container beside a vsock connection of the same VM that goes past the
//! agent and the stand-in.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::{CALL, Flavour, Runtime, World, json};

use crate::report::{Row, Section, Target, Verdict};
use crate::sample::Samples;
use crate::source;

/// Least of stdout beside the raw stream.
const TARGET: f64 = 0.8;

/// Bytes of one transfer.
const TRANSFER: usize = 128 << 20;
const MIB: f64 = (1 << 20) as f64;
/// Of a reader that has nothing else to do.
const BLOCK: usize = 64 << 10;

pub fn measure(rounds: u32) -> Section {
    let world = World::with(Runtime::built(), Flavour::Source);
    let bundle = world.bundle().args(["/bin/source"]).with(|c| {
        let env = c["process"]["env"].as_array_mut().expect("env");
        env.push(json!(format!("{}=1", source::VARIABLE)));
    });
    let program = std::env::current_exe().expect("/proc is mounted");
    std::fs::copy(program, bundle.rootfs().join("bin/source")).expect("rootfs is writable");

    let call = world.run_call(&bundle, "c").deadline(CALL * 5);
    let mut running = call.stdin_pipe().stdout_pipe().spawn();
    let mut stdin = running.stdin.take().expect("a pipe");
    let mut stdout = running.stdout.take().expect("a pipe");
    let mut ready = vec![0; source::READY.len()];
    stdout.read_exact(&mut ready).expect("the source starts");

    let (mut relayed, mut raw) = (Samples::default(), Samples::default());
    for round in 0..=rounds {
        eprint!("\rthroughput: round {round} of {rounds} ");
        writeln!(stdin, "stdout {TRANSFER}").expect("the source reads");
        let of_stdout = rate(&mut stdout);
        writeln!(stdin, "vsock {TRANSFER}").expect("the source reads");
        let of_vsock = rate(&mut connect(&world));
        // The first round only warms up.
        if round > 0 {
            relayed.add(of_stdout);
            raw.add(of_vsock);
        }
    }
    eprintln!();
    drop(stdin);
    let _ = running.wait().ok();
    Section {
        title: "Throughput: output of a container".into(),
        verdicts: vec![Verdict {
            name: "stdout / raw vsock".into(),
            value: relayed.median() / raw.median(),
            unit: "",
            target: Target::AtLeast(TARGET),
        }],
        rows: vec![
            Row::new("stdout through agent and stand-in", "MiB/s", relayed),
            Row::new("raw vsock stream", "MiB/s", raw),
        ],
    }
}

/// MiB per second, from the first block to the last.
fn rate(stream: &mut impl Read) -> f64 {
    let mut block = vec![0; BLOCK];
    let first = stream.read(&mut block).expect("the source writes");
    assert!(first > 0, "the stream ended before its first byte");
    let started = Instant::now();
    let mut left = TRANSFER - first;
    while left > 0 {
        let len = left.min(BLOCK);
        let got = stream.read(&mut block[..len]).expect("the source writes");
        assert!(got > 0, "{left} bytes are missing");
        left -= got;
    }
    (TRANSFER - first) as f64 / MIB / started.elapsed().as_secs_f64()
}

/// A connection to the source's port through the VM's vsock device.
fn connect(world: &World) -> UnixStream {
    let path = world
        .root
        .join("sandboxes")
        .join(world.id("c"))
        .join("vsock.sock");
    let mut stream =
        UnixStream::connect(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("a time-out");
    writeln!(stream, "CONNECT {}", source::PORT).expect("the device reads");
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("the device answers");
        line.push(byte[0]);
    }
    assert!(
        line.starts_with(b"OK "),
        "{}",
        String::from_utf8_lossy(&line)
    );
    stream
}
