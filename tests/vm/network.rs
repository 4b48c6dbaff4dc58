//! Networks of virtual machines: what is left on the host by those that die, what is
//! refused, other ways than packet filters. `tests/oci/network.rs` has what every
//! runtime does.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use kuasar_runv_test_harness::world::configuration;
use kuasar_runv_test_harness::{
    Bundle, Container, Flavour, Netns, SHORT, World, json, leaks, wait_until,
};

use crate::pods;
use crate::victims::{self, Victim};

const PING: &str = "ping -q -c 1 -W 5 10.77.0.1 | grep -q ' 0% packet loss' && echo reached";

/// `eth0` with 10.77.0.2 in the first, 10.77.0.1 in the second.
fn wire(world: &World) -> (Netns, Netns) {
    let (inner, outer) = (Netns::new(world, "in"), Netns::new(world, "out"));
    inner.connect("eth0", &["10.77.0.2/24"], &outer, "veth0");
    outer.address("veth0", &["10.77.0.1/24"]);
    (inner, outer)
}

fn bundle(world: &World, netns: &Netns, script: &str) -> Bundle {
    world.bundle().sh(script).network(&netns.path())
}

fn running<'w>(world: &'w World, netns: &Netns, name: &str) -> Container<'w> {
    let script = format!("{PING}; sleep 1000");
    let container = world.start(&bundle(world, netns, &script), name);
    container.wait_for_output("reached");
    container
}

#[test]
fn nothing_is_left_in_a_namespace_whatever_dies() {
    let world = World::new();
    let (inner, _outer) = wire(&world);
    for (number, victim) in [Victim::Vm, Victim::Sandboxer].into_iter().enumerate() {
        let container = running(&world, &inner, &format!("c{number}"));
        assert!(inner.links().iter().any(|name| name.starts_with("runv")));
        assert!(inner.has_filters("eth0"));
        victims::kill(&[victims::the(&world, victim)]);
        // The tap goes with the hypervisor.
        wait_until("the tap is gone", SHORT, || inner.links() == ["eth0"]);
        let _ = container.delete_force().ok();
        assert!(!inner.has_filters("eth0"), "{victim:?}");
    }
    // And it can be used again.
    drop(running(&world, &inner, "again"));
}

/// Two machines cannot have one interface. Containers of one state root share a machine
/// then; those of another root know nothing of each other.
#[test]
fn the_only_queue_of_a_tap_is_its_own() {
    let world = World::new();
    let (inner, _outer) = wire(&world);
    let _container = running(&world, &inner, "c");
    let all = inner.exec("tc", "qdisc show").ok().stdout();
    let mut taps = all.lines().filter(|line| line.contains("dev runv"));
    assert!(
        taps.any(|line| line.starts_with("qdisc noqueue")),
        "a queueing discipline in front of the tap: {all}"
    );
}

#[test]
fn filters_of_a_dead_machine_are_no_obstacle() {
    let (world, other) = (World::new(), World::new());
    let (inner, _outer) = wire(&world);
    let first = running(&world, &inner, "first");
    let script = format!("{PING}; sleep 1000");
    let second = other.create(&bundle(&other, &inner, &script), "second");
    let _ = second
        .command(&["start"])
        .fails_with(1, "another virtual machine is connected");
    assert_eq!(second.status(), "created");
    victims::kill(&[victims::the(&world, Victim::Sandboxer)]);
    wait_until("the tap is gone", SHORT, || inner.links() == ["eth0"]);
    // Nobody has deleted it, as after a crash in `podman pod restart`.
    assert_eq!(first.status(), "stopped");
    second.start();
    second.wait_for_output("reached");
}

#[test]
fn the_hosts_network_is_refused_by_path_too() {
    let world = World::new();
    for path in ["/proc/self/ns/net", "/proc/self/ns/mnt", "/no/such/netns"] {
        let words = match path {
            "/proc/self/ns/net" => "host's network",
            "/proc/self/ns/mnt" => "not a network namespace",
            _ => path,
        };
        let bundle = world.bundle().sh("exit 0").network(Path::new(path));
        let _ = world.try_create(&bundle, "c").fails_with(1, words);
        world.assert_clean();
    }
}

#[test]
fn a_macvtap_does_as_well() {
    let mut world = World::new();
    let network = "[network]\nmodel = \"macvtap\"\n";
    world.configure(&format!("{}{network}", configuration(Flavour::Source)));
    let (inner, _outer) = wire(&world);
    let container = running(&world, &inner, "c");
    assert!(!inner.has_filters("eth0"));
    assert!(inner.links().iter().any(|name| name.starts_with("runv")));
    victims::kill(&[victims::the(&world, Victim::Sandboxer)]);
    let _ = container.delete_force().ok();
    assert_eq!(inner.links(), ["eth0"]);
}

#[test]
fn several_queues_and_a_tap_for_others_to_connect() {
    let mut world = World::new();
    let text = configuration(Flavour::Source);
    world.configure(&format!(
        "{text}[vm]\nvcpus = 2\n[network]\nmodel = \"none\"\n"
    ));
    let (inner, _outer) = wire(&world);
    let script = "echo queues=$(ls -d /sys/class/net/eth0/queues/rx-* | wc -l); sleep 1000";
    let container = world.start(&bundle(&world, &inner, script), "c");
    container.wait_for_output("queues=2");
    // Somebody connects them.
    let tap = inner
        .links()
        .into_iter()
        .find(|name| name.starts_with("runv"));
    inner.ip("link add br0 type bridge");
    inner.ip("link set br0 up");
    inner.ip(&format!("link set {} master br0", tap.unwrap()));
    inner.ip("addr flush dev eth0");
    inner.ip("link set eth0 master br0");
    let _ = container.exec_sh(&[], "ip addr show eth0");
}

/// Of what is no network card, the container gets nothing, and starts.
#[test]
fn a_tap_of_a_program_is_an_endpoint_and_a_bridge_is_not() {
    let world = World::new();
    let (inner, _outer) = wire(&world);
    inner.ip("link add br7 type bridge");
    inner.ip("tuntap add mode tap name tap0");
    inner.address("tap0", &["10.80.0.2/24"]);
    inner.ip("link set tap0 up");
    let out = world.run(
        &bundle(&world, &inner, "ls /sys/class/net; ip addr show tap0"),
        "c",
    );
    let out = out.ok();
    assert!(out.stdout().contains("10.80.0.2/24"), "{}", out.stdout());
    assert!(!out.stdout().contains("br7"), "{}", out.stdout());
}

#[test]
fn statistics_have_the_interfaces() {
    let world = World::new();
    let (inner, _outer) = wire(&world);
    let container = running(&world, &inner, "c");
    let out = container.command(&["events", "--stats"]).ok();
    let event: kuasar_runv_test_harness::Value = serde_json_from(&out.stdout);
    let interfaces = &event["data"]["network_interfaces"];
    assert_eq!(interfaces[0]["Name"], "eth0", "{interfaces}");
    assert!(
        interfaces[0]["RxBytes"].as_u64().unwrap() > 80,
        "{interfaces}"
    );
    assert_eq!(interfaces.as_array().unwrap().len(), 1);
}

fn serde_json_from(bytes: &[u8]) -> kuasar_runv_test_harness::Value {
    serde_json::from_slice(bytes).unwrap()
}

/// Mounts of network namespaces that somebody else removes must not live on in the
/// mount namespaces of a virtual machine's processes: their interfaces would.
#[test]
fn a_machine_keeps_no_namespace_of_others() {
    let world = World::new();
    let (inner, outer) = wire(&world);
    let container = world.start(&world.bundle().sh("echo up; sleep 1000"), "c");
    container.wait_for_output("up");
    drop(inner);
    wait_until("the other end is gone", SHORT, || outer.links().is_empty());
}

/// `linux.netDevices` moves interfaces from the caller's namespace, so the caller is in
/// one of the test's.
#[test]
fn devices_of_the_host_are_given_to_the_container() {
    let world = World::new();
    let (host, outer) = wire(&world);
    host.connect("spare", &["10.81.0.2/24"], &outer, "veth9");
    let bundle = world
        .bundle()
        .sh(&format!("ip addr show net0; {PING}; ls /sys/class/net"))
        .capabilities(&["CAP_NET_RAW"])
        .with(|c| c["linux"]["netDevices"] = json!({"eth0": {"name": "net0"}}));
    let run = |name: &str| {
        let call = world.call(["run", "--bundle"]).arg(bundle.path());
        host.enter(|| call.arg(world.id(name)).output())
    };
    let out = run("c").ok();
    for words in ["10.77.0.2/24", "reached", "net0"] {
        assert!(out.stdout().contains(words), "{}", out.stdout());
    }
    assert!(!out.stdout().contains("spare"), "{}", out.stdout());
    // A veth goes with the namespace it is in; what is not there is an error, and
    // takes back what has been given.
    assert_eq!(host.links(), ["spare"]);
    let bundle = bundle.with(|c| {
        c["linux"]["netDevices"] = json!({"spare": {}, "zz-missing": {}});
    });
    let call = world.call(["run", "--bundle"]).arg(bundle.path());
    let out = host.enter(|| call.arg(world.id("d")).output());
    let _ = out.fails_with(1, "network device zz-missing not found");
    wait_until("it is back", SHORT, || host.links() == ["spare"]);
    assert!(host.ip("addr show spare").contains("10.81.0.2/24"));
    assert!(
        leaks::of_world(world.name(), &world.root)
            .iter()
            .all(|left| left.starts_with("mount: "))
    );
}

/// As on one host: a network is there as long as somebody lives in it.
#[test]
fn a_network_outlives_the_container_it_was_made_for() {
    let world = World::new();
    let (inner, _outer) = wire(&world);
    let pod = pods::sandbox(&world, "s");
    let wait = format!("{PING}; while :; do sleep 1000; done");
    let member = |script: &str| pods::member(&world, &pod.id, script);
    let start = |bundle: &Bundle, name: &str| {
        let container = world.start(bundle, name);
        container.wait_for_output("reached");
        container
    };
    let owner = start(&member(&wait).network(&inner.path()), "owner");
    let join = || {
        let bundle = member(&wait).joining(owner.pid, &["network"]);
        bundle.capabilities(&["CAP_NET_RAW"])
    };
    let [second, third] = ["second", "third"].map(|name| start(&join(), name));
    let reaches = |container: &Container<'_>| {
        let out = container.exec_sh(&[], PING).ok();
        assert!(out.stdout().contains("reached"), "{}", out.stdout());
    };
    let _ = owner.delete_force().ok();
    reaches(&second);
    assert!(inner.has_filters("eth0"));

    // Its id is free for one with a network of its own.
    let (next, other) = (Netns::new(&world, "next"), Netns::new(&world, "other"));
    next.connect("eth0", &["10.77.0.3/24"], &other, "veth0");
    other.address("veth0", &["10.77.0.1/24"]);
    drop(start(&member(&wait).network(&next.path()), "owner"));
    wait_until("the next network is free", SHORT, || {
        next.links() == ["eth0"]
    });
    reaches(&third);

    // What changes there is still followed.
    inner.ip("addr add 10.77.0.20/24 dev eth0");
    wait_until("the new address", SHORT, || {
        let out = second.exec_sh(&[], "ip -o addr show eth0").ok();
        out.stdout().contains("10.77.0.20/24")
    });
    let _ = second.delete_force().ok();
    reaches(&third);
    let _ = third.delete_force().ok();
    assert!(!inner.has_filters("eth0"));
    assert_eq!(inner.links(), ["eth0"]);
}

/// Engines take the network of a container apart before they delete it. A machine that
/// still waits for others, as that of a pod does, does not follow.
#[test]
fn the_network_of_an_ended_container_is_left_alone() {
    let world = World::new();
    let (inner, _outer) = wire(&world);
    let bundle = bundle(&world, &inner, PING).annotations(&[
        ("io.kubernetes.cri.container-type", "sandbox"),
        ("io.kubernetes.cri.sandbox-id", &world.id("c")),
    ]);
    let container = world.start(&bundle, "c");
    container.wait_for_output("reached");
    container.wait_for_status("stopped");
    // Long enough for the machine to say so, and to follow if it did.
    std::thread::sleep(Duration::from_secs(1));
    inner.ip("link del eth0");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(taps(&inner), 1, "{:?}", inner.links());
    let _ = container.delete().ok();
    assert_eq!(taps(&inner), 0);
}

#[test]
fn a_machine_that_ends_with_its_container_leaves_the_network_as_it_was() {
    let world = World::new();
    let (inner, _outer) = wire(&world);
    let container = world.start(&bundle(&world, &inner, PING), "c");
    container.wait_for_output("reached");
    container.wait_for_status("stopped");
    wait_until("the tap is gone", SHORT, || inner.links() == ["eth0"]);
    let _ = container.delete().ok();
    assert!(!inner.has_filters("eth0"));
    assert_eq!(inner.links(), ["eth0"]);
}

fn taps(netns: &Netns) -> usize {
    let names = netns.links();
    names.iter().filter(|name| name.starts_with("runv")).count()
}

/// The hypervisor moves frames, or the host's kernel does where it can, for each
/// processor.
#[test]
fn streams_go_both_ways_whoever_moves_the_frames() {
    const THERE: usize = 1_500_000;
    const BACK: usize = 1_000_000;
    /// Nested emulation is slow.
    const LONG: Duration = Duration::from_secs(120);
    for vhost in ["off", "auto"] {
        let mut world = World::new();
        let text = configuration(Flavour::Source);
        world.configure(&format!(
            "{text}[vm]\nvcpus = 2\n[network]\nvhost = \"{vhost}\"\n"
        ));
        let (inner, outer) = wire(&world);
        let listener = outer.enter(|| TcpListener::bind("10.77.0.1:7777").unwrap());
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(LONG)).unwrap();
            let mut data = vec![1; THERE];
            stream.read_exact(&mut data).unwrap();
            assert!(data.iter().all(|byte| *byte == 0));
            stream.write_all(&data[..BACK]).unwrap();
        });
        let script = format!(
            "echo got=$(head -c {THERE} /dev/zero | nc 10.77.0.1 7777 | wc -c); sleep 1000"
        );
        let container = world.start(&bundle(&world, &inner, &script), "c");
        wait_until("the streams' ends", LONG, || {
            container.stdout().contains(&format!("got={BACK}"))
        });
        server.join().unwrap();
    }
}
