//! Files of the rootfs beside the same files served by the distribution's virtiofsd.
//!
//! Both guests are the same QEMU machine with the same kernel and run the same
//! program ([`workload`]): one as a container's process on its rootfs, one as the
//! init of a machine that mounts virtiofsd's directory. They are told what to do by
//! files of the directory itself, in turn, and both are in the container's cgroups.
//!
//! Files are made anew for each round, so that neither guest has seen them before:
//! what is compared is the file servers and not how long a guest trusts its cache,
//! which is a matter of coherence (docs/devices.md).

mod peer;
pub mod workload;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::{Flavour, Runtime, World, data, json};

use self::peer::Peer;
use self::workload::{BYTES, FILES, Task};
use crate::report::{Row, Section, Target, Verdict};
use crate::sample::Samples;

/// Least of this runtime beside virtiofsd.
const TARGET: f64 = 1.0;
const MIB: f64 = (1 << 20) as f64;
/// Files of an image are not as new as those made here (the device's guard asks
/// more often for 3 s).
const SETTLE: Duration = Duration::from_millis(3200);
/// How long one task may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(300);

pub fn measure(rounds: u32) -> Section {
    let world = World::with(Runtime::built(), Flavour::Source);
    let bundle = world.bundle().args(["/bin/workload"]).with(|c| {
        let env = c["process"]["env"].as_array_mut().expect("env");
        env.push(json!(format!("{}=/work", workload::VARIABLE)));
    });
    let program = std::env::current_exe().expect("/proc is mounted");
    fs::copy(program, bundle.rootfs().join("bin/workload")).expect("rootfs is writable");
    let ours = bundle.rootfs().join("work");
    fs::create_dir(&ours).expect("rootfs is writable");
    let container = world.start(&bundle, "c");
    let theirs = world.path("virtiofsd");
    fs::create_dir(&theirs).expect("a directory");
    let peer = Peer::boot(&world, &theirs);

    let mut samples: Vec<[Samples; 2]> = Task::ALL.iter().map(|_| Default::default()).collect();
    for round in 0..=rounds {
        eprint!("\rfiles: round {round} of {rounds} ");
        for task in Task::ALL {
            prepare(&area(&ours, round, task), task);
            prepare(&area(&theirs, round, task), task);
        }
        std::thread::sleep(SETTLE);
        for (task, samples) in Task::ALL.into_iter().zip(&mut samples) {
            for (dir, samples) in [&ours, &theirs].into_iter().zip(samples) {
                let rate = run(dir, round, task);
                // The first round only warms up.
                if round > 0 {
                    samples.add(rate);
                }
            }
        }
    }
    eprintln!();
    drop(peer);
    let _ = container.delete_force().ok();
    section(samples)
}

fn section(samples: Vec<[Samples; 2]>) -> Section {
    let mut section = Section {
        title: "Files: the rootfs beside virtiofsd".into(),
        verdicts: Vec::new(),
        rows: Vec::new(),
    };
    for (task, [ours, theirs]) in Task::ALL.into_iter().zip(samples) {
        section.verdicts.push(Verdict {
            name: format!("{} / virtiofsd", task.name()),
            value: ours.median() / theirs.median(),
            unit: "",
            target: Target::AtLeast(TARGET),
        });
        section.rows.push(Row::new(task.name(), task.unit(), ours));
        let peer = format!("{} with virtiofsd", task.name());
        section.rows.push(Row::new(peer, task.unit(), theirs));
    }
    section
}

/// Has the guest of a directory do a task; returns its rate.
fn run(dir: &Path, round: u32, task: Task) -> f64 {
    let area = area(dir, round, task);
    let result = area.with_extension("result");
    // The name appears when everything is there.
    let order = dir.join(workload::ORDER);
    let text = format!("{} {}", task.name(), file_name(&area));
    fs::write(order.with_extension("new"), text).expect("the order");
    fs::rename(order.with_extension("new"), &order).expect("the order");
    let nanoseconds = wait_for(&result);
    fs::remove_dir_all(&area).expect("the files of the task");
    fs::remove_file(&result).expect("the result");
    task.amount() / Duration::from_nanos(nanoseconds).as_secs_f64()
}

fn area(dir: &Path, round: u32, task: Task) -> PathBuf {
    dir.join(format!("{round}-{}", task.name()))
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().expect("a path with a name");
    name.to_string_lossy().into_owned()
}

fn prepare(area: &Path, task: Task) {
    fs::create_dir(area).expect("an area");
    match task {
        Task::Read => {
            let file = fs::File::create(area.join("data")).expect("a file");
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
