//! The loopback interface of a container's network namespace, as those see it who enter
//! the namespace from the host: engines that forward ports, check the health of servers,
//! and answer names.

use std::io::{self, Read};
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use kuasar_runv_test_harness::{
    Bundle, Container, Netns, SHORT, World, process, reaper, wait_until,
};

fn bundle(world: &World, inner: &Netns, script: &str) -> Bundle {
    world.bundle().sh(script).network(&inner.path())
}

/// Sends back what it gets by TCP at port 80.
fn echoing<'w>(world: &'w World, inner: &Netns) -> Container<'w> {
    let container = world.start(&bundle(world, inner, "").probe("echo"), "c");
    container.wait_for_output("listening");
    container
}

fn wait_for_port(from: &Netns, to: &str) {
    wait_until(&format!("{to} is listened on"), SHORT, || {
        from.dial(to).is_ok()
    });
}

fn is_refused(from: &Netns, to: &str) -> bool {
    matches!(from.dial(to), Err(e) if e.kind() == io::ErrorKind::ConnectionRefused)
}

#[test]
fn a_server_is_reached_at_localhost_of_its_namespace() {
    let world = World::new();
    let (inner, _outer) = Netns::pair(&world);
    let container = echoing(&world, &inner);
    for to in ["127.0.0.1:80", "[::1]:80"] {
        wait_for_port(&inner, to);
        // More than any buffer on the way.
        inner.echo_tcp(to, 3_000_000);
    }
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| inner.echo_tcp("127.0.0.1:80", 10_000));
        }
    });
    assert!(is_refused(&inner, "127.0.0.1:81"));
    let mut open = inner.dial("127.0.0.1:80").unwrap();
    let _ = container.delete_force().ok();
    wait_until("nobody listens any more", SHORT, || {
        is_refused(&inner, "127.0.0.1:80")
    });
    // It has ended with its server, in one way or the other.
    assert!(matches!(open.read(&mut [0]), Ok(0) | Err(_)));
}

/// Also one that is started later.
#[test]
fn ports_come_and_go_with_their_servers() {
    let world = World::new();
    let (inner, _outer) = Netns::pair(&world);
    let container = world.start(&bundle(&world, &inner, "echo up; sleep 1000"), "c");
    container.wait_for_output("up");
    for round in 0..2 {
        assert!(is_refused(&inner, "127.0.0.1:8080"));
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let script = format!("echo hello {round} | nc -l -p 8080");
                container.exec_sh(&[], &script).ok()
            });
            let mut said = String::new();
            wait_until("somebody says hello", SHORT, || {
                let answer = inner
                    .dial("127.0.0.1:8080")
                    .and_then(|mut stream| stream.read_to_string(&mut said));
                answer.is_ok() && !said.is_empty()
            });
            assert_eq!(said, format!("hello {round}\n"));
            let _ = server.join().unwrap();
        });
        wait_until("nobody listens any more", SHORT, || {
            is_refused(&inner, "127.0.0.1:8080")
        });
    }
}

/// As podman without root does it, whose ports lead to the address of the card.
#[test]
fn a_server_is_reached_at_all_its_addresses_from_within_its_namespace() {
    let world = World::new();
    let (inner, _outer) = Netns::pair(&world);
    let _container = echoing(&world, &inner);
    for to in ["10.77.0.2:80", "[fd77::2]:80", "127.0.0.5:80"] {
        wait_for_port(&inner, to);
        inner.echo_tcp(to, 100_000);
    }
    assert!(is_refused(&inner, "10.77.0.2:81"));
}

/// A client of a UDP port.
struct Client(UdpSocket);

impl Client {
    fn new(from: &Netns, to: &str) -> Client {
        let any = if to.starts_with('[') {
            "[::]:0"
        } else {
            "0.0.0.0:0"
        };
        let socket = from.enter(|| UdpSocket::bind(any)).unwrap();
        socket.connect(to).unwrap();
        Client(socket)
    }

    /// Whether a datagram comes back in time.
    fn echoes(&self, datagram: &[u8], time: Duration) -> io::Result<bool> {
        self.0.set_read_timeout(Some(time))?;
        self.0.send(datagram)?;
        let mut back = [0; 65_536];
        match self.0.recv(&mut back) {
            Ok(len) => Ok(back[..len] == *datagram),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn is_refused(&self) -> bool {
        let echoes = self.echoes(b"anybody?", Duration::from_millis(200));
        matches!(echoes, Err(e) if e.kind() == io::ErrorKind::ConnectionRefused)
    }
}

/// Answers come from the address that was asked, or the client would not take them.
#[test]
fn datagrams_reach_a_server_from_within_its_namespace() {
    let world = World::new();
    let (inner, _outer) = Netns::pair(&world);
    let container = echoing(&world, &inner);
    for to in ["127.0.0.1:53", "[::1]:53", "10.77.0.2:53", "[fd77::2]:53"] {
        let client = Client::new(&inner, to);
        wait_until(&format!("{to} answers"), SHORT, || {
            client
                .echoes(b"x", Duration::from_millis(500))
                .unwrap_or(false)
        });
        for len in [0, 1, 1500, 60_000] {
            assert!(client.echoes(&vec![7; len], SHORT).unwrap(), "{to}, {len}");
        }
    }
    // Each of several hears what it has said.
    let clients: Vec<_> = (0..20)
        .map(|_| Client::new(&inner, "127.0.0.1:53"))
        .collect();
    for (n, client) in clients.iter().enumerate() {
        assert!(client.echoes(&[n as u8; 9], SHORT).unwrap());
    }
    assert!(Client::new(&inner, "127.0.0.1:54").is_refused());
    let client = &clients[0];
    let _ = container.delete_force().ok();
    wait_until("nobody answers any more", SHORT, || client.is_refused());
}

/// Also one that is started later.
#[test]
fn udp_ports_come_and_go_with_their_servers() {
    let world = World::new();
    let (inner, _outer) = Netns::pair(&world);
    let container = echoing(&world, &inner);
    let client = Client::new(&inner, "127.0.0.1:5353");
    for round in 0..2 {
        assert!(client.is_refused());
        let script = "KRT_PROBE='echo-datagrams 127.0.0.1:5353' exec /bin/probe --ignored --exact \
            probe::main --nocapture --test-threads=1";
        let server = container.exec_detached(script, &format!("server{round}"));
        wait_until("somebody answers", SHORT, || {
            client
                .echoes(b"x", Duration::from_millis(500))
                .unwrap_or(false)
        });
        process::signal(server, libc::SIGKILL).unwrap();
        assert!(reaper::wait(server, SHORT).is_some());
        wait_until("nobody answers any more", SHORT, || client.is_refused());
    }
}

/// As docker's, which is not in the container.
#[test]
fn a_name_server_of_the_namespace_serves_the_container() {
    let world = World::new();
    let (inner, _outer) = Netns::pair(&world);
    inner.name_server(Ipv4Addr::new(127, 0, 0, 11));
    let script = "nslookup some.name 127.0.0.11
        printf '\\0\\032\\1\\2\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\4some\\3org\\0\\0\\1\\0\\1' |
            nc 127.0.0.11 53 | od -An -tu1 | tr -s ' \\n' ' '
        echo done";
    let out = world.run(&bundle(&world, &inner, script), "c").ok();
    assert!(
        out.stdout().contains("Address: 192.0.2.7"),
        "{}",
        out.stdout()
    );
    assert!(out.stdout().contains(" 192 0 2 7"), "{}", out.stdout());
}
