//! Files of the rootfs beside the same files served by the distribution's virtiofsd.
//!
//! The guests are the same QEMU machine with the same kernel and run the same program
//! ([`workload`]) in a cgroup with the same controllers: one as a container's process
//! on its rootfs, two as the init of a machine that mounts virtiofsd's directory. They
//! are told what to do by files of the directory itself, in turn, and all are in the
//! container's cgroups of the host.
//!
//! A file server may be quick because its guest need not ask. The first virtiofsd lets
//! its guest trust nothing, so that a change by the host is seen at once, which is what
//! this runtime promises (docs/devices.md); the second lets it trust names and
//! attributes for a second, as it does by default.
//!
//! Files are made anew for each round, so that no guest has seen them before. While
//! they are measured the host changes nothing near them: orders lie in another
//! directory, and the guest itself removes what it is done with.

mod peer;
pub mod workload;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::{Flavour, Runtime, World, data, json};

use self::peer::{Model, Peer, Trust};
use self::workload::{BYTES, FILES, Task};
use crate::report::{Row, Section, Target, Verdict};
use crate::sample::Samples;

const COHERENT: &str = "virtiofsd";
const TRUSTING: &str = "virtiofsd, 1 s of trust";
/// Least of this runtime beside the one that promises the same.
const TARGET: f64 = 1.0;
const MIB: f64 = (1 << 20) as f64;
/// Files of an image are not as new as those made here (the device's guard asks
/// more often for 3 s).
const SETTLE: Duration = Duration::from_millis(3200);
/// How long one task may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(300);

/// One of the file servers, with its guest.
struct Way {
    name: &'static str,
    root: PathBuf,
    /// Of each task.
    samples: [Samples; Task::ALL.len()],
}

impl Way {
    fn new(name: &'static str, root: PathBuf) -> Way {
        for dir in [workload::WORK, workload::ORDERS] {
            fs::create_dir(root.join(dir)).expect("a directory");
        }
        Way {
            name,
            root,
            samples: Default::default(),
        }
    }

    fn area(&self, round: u32, task: Task) -> PathBuf {
        self.root.join(workload::WORK).join(area(round, task))
    }
}

pub fn measure(rounds: u32) -> Section {
    let world = World::with(Runtime::built(), Flavour::Source);
    let bundle = world.bundle().args(["/bin/workload"]).with(|c| {
        let env = c["process"]["env"].as_array_mut().expect("env");
        env.push(json!(format!("{}=/", workload::VARIABLE)));
    });
    let program = std::env::current_exe().expect("/proc is mounted");
    fs::copy(program, bundle.rootfs().join("bin/workload")).expect("rootfs is writable");
    let mut ways = vec![Way::new("", bundle.rootfs())];
    let container = world.start(&bundle, "c");
    let model = Model::learn(&world);
    let mut peers = Vec::new();
    for (name, trust) in [(COHERENT, Trust::Nothing), (TRUSTING, Trust::Default)] {
        let root = world.path(&format!("share-{trust:?}"));
        fs::create_dir(&root).expect("a directory");
        ways.push(Way::new(name, root.clone()));
        peers.push(Peer::boot(&world, &model, &root, trust));
    }

    for round in 0..=rounds {
        eprint!("\rfiles: round {round} of {rounds} ");
        for (way, task) in ways
            .iter()
            .flat_map(|way| Task::ALL.map(|task| (way, task)))
        {
            prepare(&way.area(round, task), task);
        }
        std::thread::sleep(SETTLE);
        for (index, task) in Task::ALL.into_iter().enumerate() {
            for way in &mut ways {
                let rate = run(way, round, task);
                // The first round only warms up.
                if round > 0 {
                    way.samples[index].add(rate);
                }
            }
        }
    }
    eprintln!();
    drop(peers);
    let _ = container.delete_force().ok();
    section(&ways)
}

fn section(ways: &[Way]) -> Section {
    let mut section = Section {
        title: "Files: the rootfs beside virtiofsd".into(),
        verdicts: Vec::new(),
        rows: Vec::new(),
    };
    for (index, task) in Task::ALL.into_iter().enumerate() {
        let ours = ways[0].samples[index].median();
        for way in ways {
            let samples = way.samples[index].clone();
            if !way.name.is_empty() {
                section.verdicts.push(Verdict {
                    name: format!("{} / {}", task.name(), way.name),
                    value: ours / samples.median(),
                    unit: "",
                    target: match way.name {
                        COHERENT => Target::AtLeast(TARGET),
                        _ => Target::None,
                    },
                });
            }
            let name = match way.name {
                "" => task.name().to_owned(),
                name => format!("{} with {name}", task.name()),
            };
            section.rows.push(Row::new(name, task.unit(), samples));
        }
    }
    section
}

/// Has a guest do a task; returns its rate.
fn run(way: &Way, round: u32, task: Task) -> f64 {
    let orders = way.root.join(workload::ORDERS);
    let result = orders.join(area(round, task));
    // The name appears when everything is there.
    let order = orders.join(workload::ORDER);
    let text = format!("{} {}", task.name(), area(round, task));
    fs::write(order.with_extension("new"), text).expect("the order");
    fs::rename(order.with_extension("new"), &order).expect("the order");
    let nanoseconds = wait_for(&result);
    fs::remove_file(&result).expect("the result");
    task.amount() / Duration::from_nanos(nanoseconds).as_secs_f64()
}

fn area(round: u32, task: Task) -> String {
    format!("{round}-{}", task.name())
}

fn prepare(area: &Path, task: Task) {
    fs::create_dir(area).expect("an area");
    match task {
        Task::Read => {
            let file = fs::File::create(area.join(workload::DATA)).expect("a file");
            data::write(3, BYTES, file).expect("its contents");
        }
        Task::Stat => {
            for n in 0..FILES {
                fs::write(area.join(n.to_string()), "").expect("a file");
            }
        }
        Task::Write | Task::Create => {}
    }
}

fn wait_for(result: &Path) -> u64 {
    let until = Instant::now() + DEADLINE;
    loop {
        let text = fs::read_to_string(result).unwrap_or_default();
        if let Some(number) = text.strip_suffix('\n') {
            return number.parse().expect("the guest writes a number");
        }
        assert!(Instant::now() < until, "{} is missing", result.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Task {
    /// Of one round: MiB, or files.
    fn amount(self) -> f64 {
        match self {
            Task::Read | Task::Write => BYTES as f64 / MIB,
            Task::Stat | Task::Create => FILES as f64,
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Task::Read | Task::Write => "MiB/s",
            Task::Stat | Task::Create => "1/s",
        }
    }
}
