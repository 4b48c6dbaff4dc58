//! `state` and `list` of one running container, beside runc's and crun's.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::time::Instant;

use kuasar_runv_test_harness::{Container, Flavour, Runtime, World};

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
    let others = ["runc", "crun"].into_iter().filter_map(|name| {
        Some(Peer {
            name,
            world: World::with(installed(name)?, Flavour::Source),
        })
    });
    std::iter::once(ours).chain(others).collect()
}

/// Another runtime, if the machine has it.
pub fn installed(name: &str) -> Option<Runtime> {
    let dirs = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];
    let path = dirs
        .iter()
        .map(|d| PathBuf::from(d).join(name))
        .find(|p| p.exists())?;
    Some(Runtime::at(path))
}

pub fn measure(rounds: u32) -> Section {
    let peers = peers();
    let containers: Vec<_> = peers.iter().map(start_container).collect();
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

fn start_container(peer: &Peer) -> Container<'_> {
    let world = &peer.world;
    let bundle = world.bundle().sh("sleep 1000");
    if peer.name != "crun" {
        return world.start(&bundle, "c");
    }
    // crun creates nothing on a host that has controllers in both cgroup versions.
    // It does without cgroups, in a mount namespace where it does not see the second;
    // the commands that are measured mind neither.
    let mut call = world.call(["--cgroup-manager=disabled", "create", "--bundle"]);
    call = call
        .arg(bundle.path())
        .arg("--pid-file")
        .arg(world.pid_file("c"))
        .arg(world.id("c"));
    // SAFETY: system calls only, with arguments that are constants.
    unsafe { call.command().pre_exec(hide_second_cgroup_version) };
    let files = (world.output_file("c.stdout"), world.output_file("c.stderr"));
    let _ = call.output_to(files.0, files.1).output().ok();
    let container = Container::adopt(world, "c");
    container.start();
    container
}

fn hide_second_cgroup_version() -> io::Result<()> {
    let (root, unified) = (c"/".as_ptr(), c"/sys/fs/cgroup/unified".as_ptr());
    let none = std::ptr::null();
    // SAFETY: constant C strings; the namespace is this process's own.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) < 0
            || libc::mount(
                none,
                root,
                none,
                libc::MS_REC | libc::MS_PRIVATE,
                none.cast(),
            ) < 0
        {
            return Err(io::Error::last_os_error());
        }
        // Hosts with one version have no such mount.
        libc::umount2(unified, libc::MNT_DETACH);
    }
    Ok(())
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
