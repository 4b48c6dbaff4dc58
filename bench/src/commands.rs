//! `state` and `list` of one running container, beside runc's and crun's.

use std::path::PathBuf;
use std::time::Instant;

use kuasar_runv_test_harness::{Flavour, Runtime, World};

use crate::report::{Row, Section, Target, Verdict};
use crate::sample::Samples;

/// Most a command may take beside runc's.
const TARGET: f64 = 0.4;

struct Peer {
    name: &'static str,
    world: World,
}

/// The runtime itself first, then those of its peers that are installed.
fn peers() -> Vec<Peer> {
    let ours = Peer {
        name: "kuasar-runv",
        world: World::with(Runtime::built(), Flavour::Source),
    };
    let installed = ["runc", "crun"].into_iter().filter_map(|name| {
        let dirs = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];
        let path = dirs
            .iter()
            .map(|d| PathBuf::from(d).join(name))
            .find(|p| p.exists())?;
        Some(Peer {
            name,
            world: World::with(Runtime::at(path), Flavour::Source),
        })
    });
    std::iter::once(ours).chain(installed).collect()
}

pub fn measure(rounds: u32) -> Section {
    let peers = peers();
    let containers: Vec<_> = peers
        .iter()
        .map(|p| p.world.start(&p.world.bundle().sh("sleep 1000"), "c"))
        .collect();
    let commands = ["state", "list"];
    let mut times = vec![[Samples::default(), Samples::default()]; peers.len()];
    for round in 0..=rounds {
        for (peer, times) in peers.iter().zip(&mut times) {
            for (command, samples) in commands.iter().zip(times) {
                let elapsed = call(peer, command);
                // The first round only warms up.
                if round > 0 {
                    samples.add(elapsed);
                }
            }
        }
    }
    drop(containers);
    let mut verdicts = Vec::new();
    for (n, command) in commands.iter().enumerate() {
        for (peer, of_peer) in peers.iter().zip(&times).skip(1) {
            let target = if peer.name == "runc" {
                Target::AtMost(TARGET)
            } else {
                Target::None
            };
            verdicts.push(Verdict {
                name: format!("{command}, kuasar-runv / {}", peer.name),
                value: times[0][n].median() / of_peer[n].median(),
                unit: "",
                target,
            });
        }
    }
    let rows = peers.iter().zip(times).flat_map(|(peer, times)| {
        let named = commands.iter().zip(times);
        named.map(|(command, samples)| Row::new(format!("{} {command}", peer.name), "ms", samples))
    });
    Section {
        title: "Commands: one running container".into(),
        rows: rows.collect(),
        verdicts,
    }
}

/// Milliseconds from the spawn of the command to its end.
fn call(peer: &Peer, command: &str) -> f64 {
    let mut args = vec![command.to_owned()];
    if command == "state" {
        args.push(peer.world.id("c"));
    }
    let call = peer.world.call(args);
    let started = Instant::now();
    let out = call.output();
    let elapsed = started.elapsed();
    let out = out.ok();
    assert!(
        out.stdout().contains(&peer.world.id("c")),
        "{}",
        out.stdout()
    );
    elapsed.as_secs_f64() * 1000.0
}
