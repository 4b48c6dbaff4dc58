//! Pods: the second container of a running machine beside runc's; one pod with many
//! containers, and what each one more costs; many pods at once.

use std::thread;
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::process::Process;
use kuasar_runv_test_harness::{Bundle, Container, Flavour, Runtime, World, leaks};

use crate::memory::{is_sandboxer, pss};
use crate::report::{Row, Section, Target, Verdict};
use crate::sample::Samples;

/// Most times the time of the second container that the last one may take.
const SLOPE: f64 = 1.2;
/// Most memory of the host's processes for one container more, in MiB.
const MEMORY: f64 = 1.2;
/// So many neighbours make one figure of a single pod steady.
const WINDOW: usize = 5;
/// Namespaces that members of a pod share.
const SHARED: [&str; 3] = ["network", "ipc", "uts"];

/// A world whose first container waits, for others to join.
struct Pod {
    world: World,
    pid: i32,
}

impl Pod {
    fn start(runtime: Runtime) -> Pod {
        let world = World::with(runtime, Flavour::Source);
        let bundle = waiting(&world);
        let sandbox = world.start(&bundle, "sandbox");
        let pid = sandbox.pid;
        // It goes with the world.
        std::mem::forget(sandbox);
        Pod { world, pid }
    }

    fn member(&self) -> Bundle {
        waiting(&self.world).joining(self.pid, &SHARED)
    }
}

fn waiting(world: &World) -> Bundle {
    world.bundle().args(["sleep", "1000"])
}

/// Milliseconds of `create` and `start`, and the container.
fn create_and_start<'w>(world: &'w World, bundle: &Bundle, name: &str) -> (f64, Container<'w>) {
    // Written before.
    let _ = bundle.path();
    let started = Instant::now();
    let container = world.start(bundle, name);
    (milliseconds(started.elapsed()), container)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// `create` and `start` of one more container, ours and runc's in turn.
pub fn second(rounds: u32) -> Section {
    let ours = Pod::start(Runtime::built());
    let runc = std::path::PathBuf::from("/usr/sbin/runc");
    let peer = runc.exists().then(|| Pod::start(Runtime::at(runc)));
    let mut samples = [Samples::default(), Samples::default()];
    let pods = [Some(&ours), peer.as_ref()];
    let bundles = pods.map(|pod| pod.map(Pod::member));
    for round in 0..=rounds {
        for ((pod, bundle), samples) in pods.iter().zip(&bundles).zip(&mut samples) {
            let (Some(pod), Some(bundle)) = (pod, bundle) else {
                continue;
            };
            let (time, container) = create_and_start(&pod.world, bundle, "c");
            let _ = container.delete_force().ok();
            // The first round only warms up.
            if round > 0 {
                samples.add(time);
            }
        }
    }
    let [of_ours, of_runc] = samples;
    let mut verdicts = Vec::new();
    let ratio = of_ours.median() / of_runc.median();
    let mut rows = vec![Row::new(
        "second container, create and start",
        "ms",
        of_ours,
    )];
    if of_runc.len() > 0 {
        verdicts.push(Verdict {
            name: "second container, kuasar-runv / runc".into(),
            value: ratio,
            unit: "",
            target: Target::None,
        });
        rows.push(Row::new("runc create and start", "ms", of_runc));
    }
    Section {
        title: "Second container of a pod".into(),
        rows,
        verdicts,
    }
}

/// One pod after the other with this many containers each.
pub fn scale(rounds: u32, containers: usize) -> Section {
    let mut by_number = vec![Samples::default(); containers + 1];
    let (mut resident, mut hypervisor) = (Samples::default(), Samples::default());
    let (mut per_container, mut guest) = (Samples::default(), Samples::default());
    for round in 1..=rounds {
        let pod = Pod::start(Runtime::built());
        let bundle = pod.member();
        let mut members = Vec::new();
        let mut before = None;
        for (number, samples) in by_number.iter_mut().enumerate().skip(2) {
            eprint!("\rscale: pod {round} of {rounds}, container {number} of {containers} ");
            let name = format!("c{number}");
            let (time, member) = create_and_start(&pod.world, &bundle, &name);
            samples.add(time);
            members.push(member);
            if number == 2 {
                before = Some(memory_of(&pod.world));
            }
        }
        let (before, after) = (before.expect("two containers"), memory_of(&pod.world));
        let each = |of: fn(&Memory) -> f64| (of(&after) - of(&before)) / (containers - 2) as f64;
        resident.add(each(|m| m.resident));
        hypervisor.add(each(|m| m.hypervisor));
        per_container.add(each(|m| m.resident + m.hypervisor));
        guest.add(each(|m| m.guest));
        for member in &members {
            let _ = member.delete_force().ok();
        }
    }
    eprintln!();
    let window = |from: usize| -> Samples {
        let all = by_number[from..].iter().take(WINDOW);
        all.map(Samples::median).collect()
    };
    let (first, last) = (window(2), window(containers + 1 - WINDOW));
    let verdict = |name: String, value, unit, most| Verdict {
        name,
        value,
        unit,
        target: Target::AtMost(most),
    };
    let verdicts = vec![
        verdict(
            format!("container {containers} / container 2, create and start"),
            last.median() / first.median(),
            "",
            SLOPE,
        ),
        verdict(
            "memory of one container more".into(),
            per_container.median(),
            "MiB",
            MEMORY,
        ),
    ];
    let mut rows = Vec::new();
    for from in (2..=containers + 1 - WINDOW).step_by(8) {
        let name = format!("containers {from} to {}", from + WINDOW - 1);
        rows.push(Row::new(name, "ms", window(from)));
    }
    rows.push(Row::new(
        format!("containers {} to {containers}", containers + 1 - WINDOW),
        "ms",
        last,
    ));
    rows.extend([
        Row::new(
            "one container more, the host's processes",
            "MiB",
            per_container,
        ),
        Row::new("  stand-in and sandboxer", "MiB", resident),
        Row::new("  QEMU (emulation: translated code)", "MiB", hypervisor),
        Row::new("one container more, the guest's memory", "MiB", guest),
    ]);
    Section {
        title: format!("Scale: one pod with {containers} containers"),
        rows,
        verdicts,
    }
}

/// Pods of one container each, created and started at the same time.
pub fn at_once(rounds: u32, pods: usize) -> Section {
    let (mut all, mut each) = (Samples::default(), Samples::default());
    let (mut resident, mut hypervisor) = (Samples::default(), Samples::default());
    let mut guest = Samples::default();
    for round in 1..=rounds {
        eprint!("\rpods at once: round {round} of {rounds} ");
        let world = World::with(Runtime::built(), Flavour::Source);
        let bundles: Vec<_> = (0..pods).map(|_| waiting(&world)).collect();
        let started = Instant::now();
        let containers: Vec<_> = thread::scope(|scope| {
            let calls: Vec<_> = bundles
                .iter()
                .enumerate()
                .map(|(n, bundle)| {
                    let world = &world;
                    scope.spawn(move || create_and_start(world, bundle, &format!("p{n}")))
                })
                .collect();
            let ended = calls.into_iter().map(|call| call.join());
            ended.map(|made| made.expect("a pod")).collect()
        });
        all.add(started.elapsed().as_secs_f64());
        for (time, _) in &containers {
            each.add(time / 1000.0);
        }
        let memory = memory_of(&world);
        resident.add(memory.resident / pods as f64);
        hypervisor.add(memory.hypervisor / pods as f64);
        guest.add(memory.guest / pods as f64);
        for (_, container) in &containers {
            let _ = container.delete_force().ok();
        }
    }
    eprintln!();
    Section {
        title: format!("Scale: {pods} pods at once"),
        rows: vec![
            Row::new("until all run", "s", all),
            Row::new("each, create and start", "s", each),
            Row::new("one pod, stand-in and sandboxer", "MiB", resident),
            Row::new("one pod, QEMU", "MiB", hypervisor),
            Row::new("one pod, the guest's memory", "MiB", guest),
        ],
        verdicts: Vec::new(),
    }
}

/// What the processes of a world occupy, in MiB.
#[derive(Default)]
struct Memory {
    /// Stand-ins and sandboxers.
    resident: f64,
    hypervisor: f64,
    /// The guests' memory, which hypervisor and sandboxer map.
    guest: f64,
}

fn memory_of(world: &World) -> Memory {
    // What is given back after the start has been given back.
    thread::sleep(Duration::from_millis(300));
    let mut sum = Memory::default();
    for process in leaks::processes(world.name()) {
        let is_hypervisor = process.comm.starts_with("qemu-system");
        if !is_hypervisor && !is_sandboxer(&process) && !is_standin(&process) {
            continue;
        }
        let one = pss(process.pid);
        sum.guest += one.guest;
        match is_hypervisor {
            true => sum.hypervisor += one.own,
            false => sum.resident += one.own,
        }
    }
    sum
}

fn is_standin(process: &Process) -> bool {
    let mut words = process.command_line.split(' ').take(2);
    words.any(|word| word == "standin")
}
