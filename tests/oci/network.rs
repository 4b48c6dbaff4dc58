//! Networks: what is in the container's network namespace on the host when it
//! starts, and what comes and goes there afterwards.

use std::io::Write;
use std::net::UdpSocket;

use kuasar_runv_test_harness::{Bundle, Container, Netns, SHORT, World, json, wait_until};

/// A container's namespace and that of a peer, connected by `eth0`.
struct Wire<'w> {
    world: &'w World,
    inner: Netns,
    outer: Netns,
}

impl<'w> Wire<'w> {
    /// 10.77.0.2 and fd77::2 here, .1 and ::1 at the peer.
    fn new(world: &'w World) -> Wire<'w> {
        let wire = Wire::bare(world);
        let addresses = ["10.77.0.2/24", "fd77::2/64"];
        wire.inner.connect("eth0", &addresses, &wire.outer, "veth0");
        wire.outer.address("veth0", &["10.77.0.1/24", "fd77::1/64"]);
        wire
    }

    fn bare(world: &'w World) -> Wire<'w> {
        Wire {
            world,
            inner: Netns::new(world, "in"),
            outer: Netns::new(world, "out"),
        }
    }

    fn bundle(&self, script: &str) -> Bundle {
        self.world.bundle().sh(script).network(&self.inner.path())
    }
}

/// Waits until a command in the container succeeds.
fn wait_for(container: &Container<'_>, command: &str) {
    let what = format!("{command} in the container");
    wait_until(&what, SHORT, || {
        container.exec_sh(&[], command).status.success()
    });
}

#[test]
fn a_container_finds_the_network_of_its_namespace() {
    let world = World::new();
    let wire = Wire::new(&world);
    wire.inner.ip("link set eth0 mtu 1400");
    wire.inner.ip("route add default via 10.77.0.1");
    wire.inner
        .ip("route add 192.0.2.0/24 via 10.77.0.1 metric 7");
    wire.inner.ip("route add blackhole 198.51.100.0/24");
    wire.inner.ip("-6 route add 2001:db8::/32 via fd77::1");
    wire.inner
        .ip("route add 203.0.113.0/24 via 10.77.0.1 table 77");
    wire.inner
        .ip("rule add from 10.77.0.2 lookup 77 priority 99");
    wire.inner
        .ip("neigh add 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0");
    let mac = wire.inner.exec("cat", "/sys/class/net/eth0/address").ok();
    let out = world.run(
        &wire.bundle(
            "f() { echo \"$1=$(shift; \"$@\" | tr '\\n' ';')\"; }
            f mac cat /sys/class/net/eth0/address
            f mtu cat /sys/class/net/eth0/mtu
            f links ls /sys/class/net
            f lo ip -o addr show lo
            f addr ip -o addr show eth0
            f route ip route
            f route6 ip -6 route
            f table ip route show table 77
            f rule ip rule
            f neigh ip neigh
            f ping ping -q -c 2 -W 5 10.77.0.1
            f ping6 ping -q -c 2 -W 5 fd77::1
            f tentative ip -6 addr show tentative
            f lo4 ping -q -c 1 127.0.0.1",
        ),
        "c",
    );
    let out = out.ok();
    assert_eq!(out.fact("mac"), format!("{};", mac.stdout().trim()));
    assert_eq!(out.fact("mtu"), "1400;");
    for (key, words) in [
        ("lo", "127.0.0.1/8"),
        ("lo", "::1/128"),
        ("addr", "10.77.0.2/24"),
        ("addr", "fd77::2/64"),
        ("addr", "fe80::"),
        ("route", "default via 10.77.0.1 dev eth0"),
        ("route", "10.77.0.0/24 dev eth0"),
        ("route", "192.0.2.0/24 via 10.77.0.1 dev eth0"),
        ("route", "metric 7"),
        ("route6", "2001:db8::/32 via fd77::1 dev eth0"),
        ("route6", "fd77::/64 dev eth0"),
        ("table", "203.0.113.0/24 via 10.77.0.1"),
        ("neigh", "10.77.0.9"),
        ("ping", " 0% packet loss"),
        ("ping6", " 0% packet loss"),
        ("lo4", " 0% packet loss"),
    ] {
        let value = out.fact(key);
        assert!(value.contains(words), "{key}: {words} not in {value}");
    }
    assert!(out.fact("rule").contains("99:"), "{}", out.fact("rule"));
    assert_eq!(out.fact("tentative"), "");
    // 198.51.100.0/24 is there, in whatever way this busybox shows it.
    assert!(out.fact("route").contains("198.51.100.0/24"));
}

#[test]
fn a_container_without_interfaces_has_only_a_loopback() {
    let world = World::new();
    let script = "ip -o link | wc -l; ip -o addr show lo; ip route; ping -q -c 1 -W 2 127.0.0.1";
    let bundle = world.bundle().sh(script).capabilities(&["CAP_NET_RAW"]);
    let out = world.run(&bundle, "c").ok();
    assert!(out.stdout().contains("127.0.0.1/8"), "{}", out.stdout());
    assert!(out.stdout().contains(" 0% packet loss"), "{}", out.stdout());
    assert!(!out.stdout().contains("eth0"), "{}", out.stdout());
}

#[test]
fn tcp_and_udp_reach_the_container_and_leave_it() {
    let world = World::new();
    let wire = Wire::new(&world);
    wire.inner.ip("link set eth0 mtu 9000");
    wire.outer.ip("link set veth0 mtu 9000");
    let bundle = wire.bundle("").probe("echo");
    let container = world.start(&bundle, "c");
    container.wait_for_output("listening");
    // More than any buffer on the way, with segments of all sizes.
    wire.outer.echo_tcp("10.77.0.2:80", 3_000_000);
    wire.outer.echo_tcp("[fd77::2]:80", 300_000);
    wire.outer.enter(|| {
        let socket = UdpSocket::bind("10.77.0.1:0").unwrap();
        socket.set_read_timeout(Some(SHORT)).unwrap();
        // Larger than a frame of Ethernet, smaller than this one's.
        let datagram = [7; 8000];
        socket.send_to(&datagram, "10.77.0.2:53").unwrap();
        let mut buffer = [0; 9000];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((length, from.port()), (8000, 53));
    });
    let big = container
        .exec_sh(&[], "ping -q -c 1 -s 8900 -W 5 10.77.0.1")
        .ok();
    assert!(big.stdout().contains(" 0% packet loss"), "{}", big.stdout());
    // Out of the container, to a listener of the peer.
    let answer = wire.outer.enter(|| {
        let listener = std::net::TcpListener::bind("10.77.0.1:7777").unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"from outside\n").unwrap();
        });
        let said = container.exec_sh(&[], "nc 10.77.0.1 7777 </dev/null").ok();
        server.join().unwrap();
        said.stdout()
    });
    assert_eq!(answer, "from outside\n");
}

/// As docker and `ctr --cni` do it.
#[test]
fn interfaces_may_appear_between_create_and_start() {
    let world = World::new();
    let wire = Wire::bare(&world);
    let container = world.create(
        &wire.bundle("ip -o addr show eth0; ping -q -c 1 -W 5 10.77.0.1; sleep 1000"),
        "c",
    );
    let addresses = ["10.77.0.2/24"];
    wire.inner.connect("eth0", &addresses, &wire.outer, "veth0");
    wire.outer.address("veth0", &["10.77.0.1/24"]);
    container.start();
    container.wait_for_output(" 0% packet loss");
    assert!(container.stdout().contains("10.77.0.2/24"));
}

/// As docker does it: the namespace is the container's own, and the hook finds it by
/// the pid in the state.
#[test]
fn a_prestart_hook_may_make_the_interface() {
    let world = World::new();
    let outer = Netns::new(&world, "out");
    let script = format!(
        "set -e; pid=$(grep -o '\"pid\": *[0-9]*' | grep -o '[0-9]*')
        PATH=/usr/sbin:/usr/bin:/sbin:/bin
        ip -n {0} link add veth0 type veth peer name eth0 netns $pid
        ip -n {0} addr add 10.77.0.1/24 dev veth0; ip -n {0} link set veth0 up
        nsenter -t $pid -n ip addr add 10.77.0.2/24 dev eth0
        nsenter -t $pid -n ip link set eth0 up",
        outer.name()
    );
    let bundle = world
        .bundle()
        .sh("ping -q -c 1 -W 5 10.77.0.1")
        .capabilities(&["CAP_NET_RAW"])
        .with(|c| {
            c["hooks"] = json!({"prestart": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
        });
    let out = world.run(&bundle, "c").ok();
    assert!(out.stdout().contains(" 0% packet loss"), "{}", out.stdout());
}

/// `podman network connect` and `disconnect`, and changes of what is there.
#[test]
fn a_running_container_follows_its_namespace() {
    let world = World::new();
    let wire = Wire::new(&world);
    let container = world.start(&wire.bundle("echo up; sleep 1000"), "c");
    container.wait_for_output("up");
    for round in 0..2 {
        let addresses = ["10.78.0.2/24"];
        wire.inner.connect("eth1", &addresses, &wire.outer, "veth1");
        wire.outer.address("veth1", &["10.78.0.1/24"]);
        wait_for(&container, "ping -q -c 1 -W 1 10.78.0.1");
        wire.inner.ip("route add 192.0.2.0/24 via 10.78.0.1");
        wait_for(&container, "ip route | grep -q 192.0.2.0/24");
        wire.inner.ip("link set eth1 mtu 1300");
        wait_for(&container, "ip link show eth1 | grep -q 'mtu 1300'");
        wire.inner.ip("addr add 10.78.0.3/24 dev eth1");
        wait_for(&container, "ip addr show eth1 | grep -q 10.78.0.3");
        wire.inner.ip("addr del 10.78.0.3/24 dev eth1");
        wait_for(&container, "! ip addr show eth1 | grep -q 10.78.0.3");
        wire.inner.ip("link del eth1");
        wait_for(&container, "! ip link show eth1");
        let left = wire.inner.links();
        assert!(
            !left.contains(&"eth1".to_owned()),
            "round {round}: {left:?}"
        );
        let still = container.exec_sh(&[], "ping -q -c 1 -W 5 10.77.0.1").ok();
        assert!(still.stdout().contains(" 0% packet loss"));
    }
    // What the container has set up itself is its own.
    let own = container.exec_sh(&[], "ip addr add 10.99.0.1/24 dev eth0");
    if own.status.success() {
        wire.inner.ip("addr add 10.77.0.7/24 dev eth0");
        wait_for(&container, "ip addr show eth0 | grep -q 10.77.0.7");
        let out = container.exec_sh(&[], "ip addr show eth0").ok();
        assert!(out.stdout().contains("10.99.0.1"), "{}", out.stdout());
    }
}

#[test]
fn a_namespace_may_have_several_interfaces_of_several_kinds() {
    let world = World::new();
    let wire = Wire::new(&world);
    let addresses = ["10.78.0.2/24"];
    wire.inner.connect("net1", &addresses, &wire.outer, "veth1");
    wire.outer.address("veth1", &["10.78.0.1/24"]);
    // A macvlan on the peer's side of another wire.
    let lower = Netns::new(&world, "low");
    lower.connect("low0", &[], &wire.outer, "veth2");
    wire.outer.address("veth2", &["10.79.0.1/24"]);
    lower.ip(&format!(
        "link add link low0 name mac0 netns {} type macvlan mode bridge",
        wire.inner.name()
    ));
    wire.inner.address("mac0", &["10.79.0.2/24"]);
    wire.inner.ip("link set mac0 up");
    let out = world.run(
        &wire.bundle(
            "for n in 77 78 79; do echo n$n=$(ping -q -c 1 -W 5 10.$n.0.1 | grep loss); done
            echo names=$(ls /sys/class/net)",
        ),
        "c",
    );
    let out = out.ok();
    for key in ["n77", "n78", "n79"] {
        assert!(
            out.fact(key).contains(" 0% packet loss"),
            "{}",
            out.stdout()
        );
    }
    for name in ["eth0", "net1", "mac0", "lo"] {
        assert!(out.fact("names").contains(name), "{}", out.stdout());
    }
}

/// A hypervisor may have only so many places for cards.
#[test]
fn each_of_many_interfaces_works() {
    const MANY: usize = 14;
    let world = World::new();
    let wire = Wire::bare(&world);
    for n in 1..=MANY {
        let (inner, outer) = (format!("net{n}"), format!("veth{n}"));
        let address = format!("10.80.{n}.2/24");
        wire.inner.connect(&inner, &[&address], &wire.outer, &outer);
        wire.outer.address(&outer, &[&format!("10.80.{n}.1/24")]);
    }
    let script = format!(
        "for n in $(seq {MANY}); do
            ping -q -c 1 -W 5 10.80.$n.1 | grep -q ' 0% packet loss' && echo reached
        done"
    );
    let out = world.run(&wire.bundle(&script), "c").ok();
    assert_eq!(out.stdout(), "reached\n".repeat(MANY));
}

#[test]
fn two_containers_talk_over_a_bridge() {
    let world = World::new();
    let host = Netns::new(&world, "host");
    host.ip("link add br0 type bridge");
    host.ip("link set br0 up");
    let ends = ["a", "b"].map(|name| Netns::new(&world, name));
    for (number, end) in ends.iter().enumerate() {
        let (v4, v6) = (
            format!("10.77.0.{}/24", number + 2),
            format!("fd77::{}/64", number + 2),
        );
        end.connect("eth0", &[&v4, &v6], &host, &format!("port{number}"));
        host.ip(&format!("link set port{number} master br0"));
    }
    let server = world.bundle().probe("echo").network(&ends[0].path());
    let server = world.start(&server, "a");
    server.wait_for_output("listening");
    let client = world.run(
        &world
            .bundle()
            .sh("echo across | nc 10.77.0.2 80; ping -q -c 1 -W 5 fd77::2 | grep loss")
            .network(&ends[1].path()),
        "b",
    );
    let client = client.ok();
    assert!(
        client.stdout().starts_with("across\n"),
        "{}",
        client.stdout()
    );
    assert!(
        client.stdout().contains(" 0% packet loss"),
        "{}",
        client.stdout()
    );
}

/// `podman pod restart`, and everything else that starts a container anew.
#[test]
fn a_namespace_serves_one_container_after_another() {
    let world = World::new();
    let wire = Wire::new(&world);
    for round in 0..2 {
        let bundle = wire.bundle("ping -q -c 1 -W 5 10.77.0.1");
        let out = world.run(&bundle, &format!("c{round}")).ok();
        assert!(out.stdout().contains(" 0% packet loss"), "{}", out.stdout());
        assert_eq!(wire.inner.links(), ["eth0"]);
        assert!(!wire.inner.has_filters("eth0"));
    }
}

#[test]
fn settings_of_an_interface_can_be_made() {
    let world = World::new();
    let wire = Wire::new(&world);
    // By an engine, and by the configuration.
    wire.inner
        .exec("sysctl", "-q -w net.ipv6.conf.eth0.accept_ra=0")
        .ok();
    let bundle = wire
        .bundle("cat /proc/sys/net/ipv6/conf/eth0/accept_ra /proc/sys/net/ipv4/conf/eth0/rp_filter /proc/sys/net/ipv4/ip_forward")
        .with(|c| {
            c["linux"]["sysctl"] = json!({
                "net.ipv4.conf.eth0.rp_filter": "2", "net.ipv4.ip_forward": "1",
            });
        });
    assert_eq!(world.run(&bundle, "c").ok().stdout(), "0\n2\n1\n");
}

/// As podman does it with `--uidmap`: the namespace belongs to the user namespace, so
/// it is made with it and filled later.
#[test]
fn the_network_belongs_to_the_containers_user_namespace() {
    let world = World::new();
    let outer = Netns::new(&world, "out");
    let script = "ip addr show eth0; ip link set eth0 mtu 1234; cat /sys/class/net/eth0/mtu
        sleep 1000";
    let bundle = world
        .bundle()
        .sh(script)
        .capabilities(&["CAP_NET_ADMIN"])
        .with(|c| {
            let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.push(json!({"type": "user"}));
            let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
            c["linux"]["uidMappings"] = map.clone();
            c["linux"]["gidMappings"] = map;
        });
    let container = world.create(&bundle, "c");
    let pid = container.pid;
    outer.ip(&format!(
        "link add veth0 type veth peer name eth0 netns {pid}"
    ));
    outer.ip("link set veth0 up");
    outer.run_in(pid, "ip addr add 10.77.0.2/24 dev eth0");
    outer.run_in(pid, "ip link set eth0 up");
    container.start();
    container.wait_for_output("1234");
    assert!(container.stdout().contains("10.77.0.2/24"));
}
