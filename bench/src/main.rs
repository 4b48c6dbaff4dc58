//! `make bench`: what a container in a VM costs, beside what it could cost at best.
//!
//! ```text
//!  start       floor (same QEMU and kernel, an init that prints) | run | run --debug
//!  commands    state and list of kuasar-runv | runc | crun
//!  exec        exec of `true` | the guest's part of it | runc; a hundred at once
//!  second      create and start of a second container in a running VM | runc
//!  scale       one pod with many containers: time and memory of each; many pods at once
//!  memory      proportional set size of stand-in and sandboxer
//!  throughput  stdout of the container | a vsock stream of the same VM
//!  network     TCP through a container's network | a bare tap of the same VM
//!  files       files of the rootfs | the same served by virtiofsd with and without trust
//!  engines     `true` with podman and ctr, kuasar-runv | runc | the floor
//!  keys        one key typed at `run` until it is shown, kuasar-runv | runc
//! ```
//!
//! Things that are compared run in turn within one round, so that a busy machine is
//! busy for both; medians are printed, and ratios are of medians. CPU time is that
//! of every process involved: this program is a subreaper, so the hypervisor, the
//! sandboxer and the stand-in end as its children, and what `getrusage` counts for
//! children is all of them.
//!
//! Inside the guest of the throughput measurement the same binary is the source of
//! the bytes ([`source`]).

// A measurement that cannot be made has nothing to go on with.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod commands;
mod engines;
mod exec;
mod files;
mod floor;
mod keys;
mod machine;
mod memory;
mod network;
mod pods;
mod report;
mod sample;
mod source;
mod start;
mod throughput;

use std::path::PathBuf;

use clap::Parser;

/// Measures kuasar-runv beside the floor, runc and crun.
///
/// Needs root, `make image floor`, and the packages runc, crun and busybox-static.
#[derive(Parser)]
struct Options {
    /// Rounds of the measurements that boot a VM
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Rounds of the measurements of milliseconds
    #[arg(long, default_value_t = 41, value_parser = clap::value_parser!(u32).range(1..))]
    command_rounds: u32,
    /// Keys that are typed
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    keys: u32,
    /// Pods of the measurements of many containers, which take minutes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    scale_rounds: u32,
    /// Containers of the pod with many
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(12..=200))]
    containers: u32,
    /// Pods at once
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=64))]
    pods: u32,
    /// Also write the result as Markdown
    #[arg(long)]
    markdown: Option<PathBuf>,
    /// What to measure (default: everything)
    #[arg(value_enum)]
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Start,
    Commands,
    Exec,
    Second,
    Scale,
    Memory,
    Throughput,
    Network,
    Files,
    Keys,
    Engines,
}

fn main() {
    if source::is_wanted() {
        return source::main();
    }
    if network::is_wanted() {
        return network::main();
    }
    if let Some(root) = files::workload::root() {
        files::workload::main(&root);
    }
    let options = Options::parse();
    let wanted = |part| options.parts.is_empty() || options.parts.contains(&part);
    let mut report = report::Report::new(machine::describe());
    println!("{}\n", report.header());
    if wanted(Part::Start) {
        report.add(start::measure(options.rounds));
    }
    if wanted(Part::Commands) {
        report.add(commands::measure(options.command_rounds));
    }
    if wanted(Part::Exec) {
        report.add(exec::measure(options.command_rounds));
    }
    if wanted(Part::Second) {
        report.add(pods::second(options.command_rounds));
    }
    if wanted(Part::Scale) {
        let rounds = options.scale_rounds;
        report.add(pods::scale(rounds, options.containers as usize));
        report.add(pods::at_once(rounds, options.pods as usize));
    }
    if wanted(Part::Memory) {
        report.add(memory::measure(options.rounds));
    }
    if wanted(Part::Throughput) {
        report.add(throughput::measure(options.rounds));
    }
    if wanted(Part::Network) {
        report.add(network::measure(options.rounds));
    }
    if wanted(Part::Files) {
        report.add(files::measure(options.rounds));
    }
    if wanted(Part::Keys) {
        report.add(keys::measure(options.keys));
    }
    if wanted(Part::Engines) {
        report.add(engines::measure(options.rounds));
    }
    if let Some(path) = options.markdown {
        std::fs::write(&path, report.markdown())
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        println!("written to {}", path.display());
    }
}
