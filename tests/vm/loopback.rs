//! The loopback interface of a container's network namespace: what only a machine of
//! its own has to do for it. What runc does as well is in tests/oci.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream, UdpSocket};
use std::time::Duration;

use kuasar_runv_test_harness::{Bundle, Container, Netns, SHORT, World, wait_until};

use crate::victims::{self, Victim};

fn server(world: &World, inner: &Netns) -> Bundle {
    world.bundle().sh("").network(&inner.path()).probe("echo")
}

fn listening<'w>(world: &'w World, inner: &Netns) -> Container<'w> {
    let container = world.start(&server(world, inner), "c");
    container.wait_for_output("listening");
    container
}

fn resolves(container: &Container<'_>) -> bool {
    let out = container.exec_sh(&[], "nslookup some.name 127.0.0.11");
    out.stdout().contains("192.0.2.7")
}

/// It comes with a network that the container is connected to later, and does not take
/// the port from a server in the container.
#[test]
fn a_name_server_may_come_later() {
    let world = World::new();
    let (inner, outer) = Netns::pair(&world);
    // Port 53 of all addresses would be taken in the namespace as well.
    let bundle = world.bundle().sh("").network(&inner.path());
    let container = world.start(&bundle.probe("echo-datagrams 10.77.0.2:53"), "c");
    container.wait_for_output("listening");
    assert!(!resolves(&container));
    inner.name_server(Ipv4Addr::new(127, 0, 0, 11));
    inner.connect("eth1", &["10.78.0.2/24"], &outer, "veth1");
    wait_until("names are answered", SHORT, || resolves(&container));
    // The container's own server still has the port.
    let own = outer.enter(|| {
        let socket = UdpSocket::bind("10.77.0.1:0").unwrap();
        socket.set_read_timeout(Some(SHORT)).unwrap();
        socket.send_to(b"mine", "10.77.0.2:53").unwrap();
        let mut buffer = [0; 10];
        let (len, _) = socket.recv_from(&mut buffer).unwrap();
        buffer[..len].to_vec()
    });
    assert_eq!(own, b"mine");
}

/// Programs that have only sockets of IPv6, and look at who answers.
#[test]
fn a_name_server_serves_sockets_of_ipv6() {
    let world = World::new();
    let (inner, _outer) = Netns::pair(&world);
    inner.name_server(Ipv4Addr::new(127, 0, 0, 11));
    let bundle = world.bundle().sh("").network(&inner.path());
    let container = world.start(&bundle.probe("ask-by-ipv6 127.0.0.11"), "c");
    container.wait_for_output("done");
    for way in ["unconnected", "connected", "tcp"] {
        let fact = format!("{way}=[::ffff:127.0.0.11]:53 192.0.2.7");
        assert!(container.stdout().contains(&fact), "{}", container.stdout());
    }
}

/// What it asks others for goes past the machine, as docker's does that has to ask the
/// name servers of the host.
#[test]
fn a_name_server_can_ask_others() {
    let world = World::new();
    let (inner, outer) = Netns::pair(&world);
    let servers = [
        IpAddr::from([10, 77, 0, 1]),
        IpAddr::from([0xfd77, 0, 0, 0, 0, 0, 0, 1]),
    ];
    for server in servers {
        outer.name_server(server);
    }
    let question =
        *b"\x01\x02\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04some\x03org\x00\x00\x01\x00\x01";
    let ask = |server: IpAddr| {
        let any = match server {
            IpAddr::V4(_) => "0.0.0.0:0",
            IpAddr::V6(_) => "[::]:0",
        };
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_read_timeout(Some(SHORT)).unwrap();
        socket.connect((server, 53)).unwrap();
        socket.send(&question).unwrap();
        let mut answer = [0; 512];
        let len = socket.recv(&mut answer).unwrap();
        assert!(answer[..len].ends_with(&[192, 0, 2, 7]));
        let mut stream = TcpStream::connect_timeout(&(server, 53).into(), SHORT).unwrap();
        stream.set_read_timeout(Some(SHORT)).unwrap();
        let len = u8::try_from(question.len()).unwrap();
        stream
            .write_all(&[&[0, len], &question[..]].concat())
            .unwrap();
        let mut len = [0; 2];
        stream.read_exact(&mut len).unwrap();
        let mut answer = vec![0; u16::from_be_bytes(len).into()];
        stream.read_exact(&mut answer).unwrap();
        assert!(answer.ends_with(&[192, 0, 2, 7]));
    };
    inner.name_server(Ipv4Addr::new(127, 0, 0, 11));
    let container = listening(&world, &inner);
    for server in servers {
        inner.enter(|| ask(server));
        // The container asks for itself as before.
        let out = container.exec_sh(&[], &format!("nslookup some.name {server}"));
        assert!(out.ok().stdout().contains("192.0.2.7"), "{server}");
    }
    let _ = container.delete_force().ok();
    assert!(!inner.has_filters("eth0"));
}

/// An open connection has threads too.
#[test]
fn its_threads_may_only_listen() {
    const NET_BIND_SERVICE: u64 = 1 << 10;
    let world = World::new();
    let (inner, _outer) = Netns::pair(&world);
    inner.name_server(Ipv4Addr::new(127, 0, 0, 11));
    let _container = listening(&world, &inner);
    let connect = || inner.enter(|| TcpStream::connect("127.0.0.1:80"));
    let mut open = None;
    wait_until("the port is listened on", SHORT, || {
        open = connect().ok();
        open.is_some()
    });
    let sandboxer = victims::the(&world, Victim::Sandboxer);
    let mut all = Vec::new();
    wait_until("there are all threads", SHORT, || {
        let threads = victims::threads(sandboxer).into_iter();
        all = threads
            .filter(|(name, _)| ["loopback", "resolver"].contains(&name.as_str()))
            .collect();
        all.len() == 3
    });
    let expected = [
        ("loopback", 0),
        ("loopback", NET_BIND_SERVICE),
        ("resolver", 0),
    ];
    assert_eq!(all, expected.map(|(name, caps)| (name.to_owned(), caps)));
}

/// As many as there may be; the others wait.
#[test]
fn connections_have_a_bound() {
    let world = World::new();
    let (inner, _outer) = Netns::pair(&world);
    let _container = listening(&world, &inner);
    let connect = || inner.enter(|| TcpStream::connect("127.0.0.1:80"));
    let mut open = Vec::new();
    wait_until("the port is listened on", SHORT, || {
        open.extend(connect().ok());
        !open.is_empty()
    });
    while open.len() < 150 {
        open.push(connect().unwrap());
    }
    let sandboxer = victims::the(&world, Victim::Sandboxer);
    let threads = || {
        let threads = victims::threads(sandboxer);
        threads
            .iter()
            .filter(|(name, _)| name == "loopback")
            .count()
    };
    // One listens.
    wait_until("all threads there may be", SHORT, || threads() == 129);
    drop(open);
    wait_until("the others have had their turn", SHORT, || threads() == 1);
    inner.echo_tcp("127.0.0.1:80", 5);
}

/// Who has been silent for longest makes room, and begins anew when it asks again.
#[test]
fn clients_of_udp_ports_have_a_bound() {
    let world = World::new();
    let (inner, _outer) = Netns::pair(&world);
    let container = listening(&world, &inner);
    let client = || {
        let socket = inner.enter(|| UdpSocket::bind("127.0.0.1:0")).unwrap();
        socket.connect("127.0.0.1:53").unwrap();
        socket
    };
    let echoes = |client: &UdpSocket, time| {
        client.set_read_timeout(Some(time)).unwrap();
        let mut back = [0; 10];
        client.send(b"hello").is_ok() && matches!(client.recv(&mut back), Ok(5))
    };
    let first = client();
    wait_until("the port is listened on", SHORT, || {
        echoes(&first, Duration::from_millis(500))
    });
    let clients: Vec<_> = (0..200).map(|_| client()).collect();
    for client in clients.iter().chain([&first]) {
        assert!(echoes(client, SHORT));
    }
    // The server's own, and one for each session.
    let sockets = || {
        let out = container
            .exec_sh(&[], "grep -c ' 01 ' /proc/net/udp")
            .stdout();
        out.trim().parse::<usize>().unwrap()
    };
    wait_until("the sockets of the others are closed", SHORT, || {
        sockets() == 128
    });
}
