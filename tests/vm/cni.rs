//! The plugins of the Container Network Interface that the distribution has, as
//! containerd and CRI-O call them: interfaces they make are the container's.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use kuasar_runv_test_harness::{Invocation, Netns, SHORT, Value, World, json};

const PLUGINS: &str = "/usr/lib/cni";

/// The namespace that is the plugins' host, and the container's.
struct Cni<'w> {
    world: &'w World,
    host: &'w Netns,
    inner: &'w Netns,
}

impl Cni<'_> {
    /// Calls a plugin; its answer, or the error it prints.
    fn call(&self, command: &str, interface: &str, config: &Value) -> Result<Value, String> {
        let plugin = config["type"].as_str().unwrap();
        let output = Invocation::new(Path::new("ip"))
            .args(["netns", "exec", self.host.name()])
            .arg(Path::new(PLUGINS).join(plugin))
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", self.world.name())
            .env("CNI_NETNS", self.inner.path())
            .env("CNI_IFNAME", interface)
            .env("CNI_PATH", PLUGINS)
            .stdin_bytes(config.to_string())
            .output();
        if !output.status.success() {
            return Err(format!("{plugin}: {}{}", output.stdout(), output.stderr()));
        }
        Ok(serde_json::from_slice(&output.stdout).unwrap_or(Value::Null))
    }

    /// A network with addresses below 10.88.`subnet`.0/24.
    fn config(&self, kind: &str, subnet: u8) -> Value {
        json!({
            "cniVersion": "0.4.0", "name": format!("{}-{kind}", self.world.name()), "type": kind,
            "ipam": {
                "type": "host-local", "dataDir": self.world.path("cni"),
                "ranges": [[{"subnet": format!("10.88.{subnet}.0/24")}]],
            },
        })
    }
}

fn with(mut config: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn interfaces_of_all_plugins_are_the_containers() {
    let world = World::new();
    let host = Netns::new(&world, "host");
    let inner = Netns::new(&world, "in");
    let outside = Netns::new(&world, "out");
    host.connect("up0", &["192.0.2.2/24"], &outside, "out0");
    // What is behind the host: the gateway of networks on top of its interface.
    outside.address("out0", &["192.0.2.1/24", "10.88.3.1/24", "10.88.4.1/24"]);
    let _ = host.exec("sysctl", "-q -w net.ipv4.ip_forward=1").ok();
    let cni = Cni {
        world: &world,
        host: &host,
        inner: &inner,
    };

    let bridge = with(
        cni.config("bridge", 1),
        json!({"bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true}),
    );
    let bridge = with(
        bridge,
        json!({"ipam": {
            "type": "host-local", "dataDir": world.path("cni"),
            "ranges": [[{"subnet": "10.88.1.0/24"}], [{"subnet": "fd88:1::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }}),
    );
    let result = cni.call("ADD", "eth0", &bridge).unwrap();
    let address = result["ips"][0]["address"].as_str().unwrap();
    let address = address.split('/').next().unwrap().to_owned();
    let portmap = json!({
        "cniVersion": "0.4.0", "name": "ports", "type": "portmap", "prevResult": result,
        "runtimeConfig": {"portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        ]},
    });
    let _ = cni.call("ADD", "eth0", &portmap).unwrap();
    let _ = cni.call("ADD", "net1", &cni.config("ptp", 2)).unwrap();
    let macvlan = with(cni.config("macvlan", 3), json!({"master": "up0"}));
    let _ = cni.call("ADD", "net2", &macvlan).unwrap();
    let ipvlan = with(cni.config("ipvlan", 4), json!({"master": "up0"}));
    let has_ipvlan = not_without_a_driver(cni.call("ADD", "net3", &ipvlan));
    let vlan = with(cni.config("vlan", 5), json!({"master": "up0", "vlanId": 5}));
    let has_vlan = not_without_a_driver(cni.call("ADD", "net4", &vlan));
    if has_vlan {
        outside.ip("link add link out0 name out0.5 type vlan id 5");
        outside.address("out0.5", &["10.88.5.1/24"]);
        outside.ip("link set out0.5 up");
    }

    let bundle = world.bundle().probe("echo").network(&inner.path());
    let container = world.start(&bundle, "c");
    container.wait_for_output("listening");
    let mut gateways = vec!["10.88.1.1", "fd88:1::1", "10.88.2.1", "10.88.3.1"];
    gateways.extend(has_ipvlan.then_some("10.88.4.1"));
    gateways.extend(has_vlan.then_some("10.88.5.1"));
    for gateway in gateways {
        let ping = container.exec_sh(&[], &format!("ping -q -c 1 -W 5 {gateway}"));
        let out = ping.stdout();
        assert!(out.contains(" 0% packet loss"), "{gateway}: {out}");
    }
    let routes = container.exec_sh(&[], "ip route").ok().stdout();
    assert!(routes.contains("default via 10.88.1.1"), "{routes}");
    // A published port, from outside the host, and the container's own address.
    outside.ip("route add 10.88.0.0/16 via 192.0.2.2");
    for to in ["192.0.2.2:8080", &format!("{address}:80")] {
        let back = outside.enter(|| {
            let mut stream = TcpStream::connect_timeout(&to.parse().unwrap(), SHORT).unwrap();
            stream.set_read_timeout(Some(SHORT)).unwrap();
            stream.write_all(b"hello").unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut back = String::new();
            stream.read_to_string(&mut back).unwrap();
            back
        });
        assert_eq!(back, "hello", "{to}");
    }

    // As kubelet does it: networks go before the container, or after it.
    let _ = cni.call("DEL", "net1", &cni.config("ptp", 2)).unwrap();
    kuasar_runv_test_harness::wait_until("net1 is gone", SHORT, || {
        !container.exec_sh(&[], "ip link show net1").status.success()
    });
    let _ = container.delete_force().ok();
    for (name, config) in [("net2", &macvlan), ("eth0", &bridge)] {
        let _ = cni.call("DEL", name, config).unwrap();
    }
    let left: Vec<_> = inner.links();
    assert!(!left.contains(&"eth0".to_owned()), "{left:?}");
}

/// Whether a plugin has made an interface. It may be that this kernel has no driver for
/// it, which the plugin has to say; everything else is a failure.
#[track_caller]
fn not_without_a_driver(result: Result<Value, String>) -> bool {
    match result {
        Ok(_) => true,
        Err(e) if e.contains("operation not supported") => false,
        Err(e) => panic!("{e}"),
    }
}
