//! Network namespaces of a world: one for a container, others for its peers. Nothing
//! is ever made in the namespace the tests run in.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::bundle::Bundle;
use crate::invocation::{Invocation, Output};
use crate::wait::SHORT;
use crate::world::World;

/// Where `ip netns` keeps them.
const DIR: &str = "/run/netns";

/// A network namespace that is removed when the value is dropped.
pub struct Netns {
    name: String,
}

impl Netns {
    /// A new namespace with nothing but a loopback interface, which is up.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new(world: &World, name: &str) -> Netns {
        let netns = Netns {
            name: format!("{}-{name}", world.name()),
        };
        let _ = tool("ip", ["netns", "add", &netns.name]).ok();
        netns.ip("link set lo up");
        netns
    }

    /// For `linux.namespaces`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(DIR).join(&self.name)
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` in it.
    ///
    /// # Panics
    /// When that fails.
    pub fn ip(&self, words: &str) -> String {
        let args = ["-n", &self.name].into_iter().chain(words.split(' '));
        tool("ip", args).ok().stdout()
    }

    /// Runs a program in it.
    #[must_use]
    pub fn exec(&self, program: &str, words: &str) -> Output {
        let args = ["netns", "exec", &self.name, program]
            .into_iter()
            .chain(words.split(' ').filter(|word| !word.is_empty()));
        tool("ip", args)
    }

    /// Runs a program in the network namespace of a process.
    ///
    /// # Panics
    /// When that fails.
    pub fn run_in(&self, pid: i32, words: &str) {
        let pid = pid.to_string();
        let args = ["-t", &pid, "-n"].into_iter().chain(words.split(' '));
        let _ = tool("nsenter", args).ok();
    }

    /// A namespace for a container, with `eth0` at 10.77.0.2 and fd77::2, and one for its
    /// peer, with the other end at 10.77.0.1 and fd77::1.
    #[must_use]
    pub fn pair(world: &World) -> (Netns, Netns) {
        let (inner, outer) = (Netns::new(world, "in"), Netns::new(world, "out"));
        inner.connect("eth0", &["10.77.0.2/24", "fd77::2/64"], &outer, "veth0");
        outer.address("veth0", &["10.77.0.1/24", "fd77::1/64"]);
        (inner, outer)
    }

    /// Connects from within it; the stream has deadlines.
    ///
    /// # Errors
    /// Of connect(2).
    ///
    /// # Panics
    /// When `to` is no address with a port.
    pub fn dial(&self, to: &str) -> io::Result<TcpStream> {
        let to: SocketAddr = to.parse().expect("an address with a port");
        self.enter(|| {
            let stream = TcpStream::connect_timeout(&to, SHORT)?;
            stream.set_read_timeout(Some(SHORT))?;
            stream.set_write_timeout(Some(SHORT))?;
            Ok(stream)
        })
    }

    /// Sends so many bytes to a server that sends them back, all at the same time.
    ///
    /// # Panics
    /// When they do not come back.
    pub fn echo_tcp(&self, to: &str, bytes: usize) {
        let mut stream = self.dial(to).expect("a server");
        let data: Vec<u8> = (0..bytes).map(|n| (n % 251) as u8).collect();
        let mut writer = stream.try_clone().expect("a descriptor");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                writer.write_all(&data).expect("it takes them");
                writer.shutdown(Shutdown::Write).expect("the end");
            });
            let mut back = Vec::new();
            stream.read_to_end(&mut back).expect("they come back");
            assert!(back == data, "{to}: {} of {bytes} bytes", back.len());
        });
    }

    /// Runs something in it, on a thread of its own.
    ///
    /// # Panics
    /// When the work does, or the namespace is gone.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(self.path()).expect("the namespace is there");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: only changes the namespace of this thread, which ends.
                let rc = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(rc, 0, "setns: {}", std::io::Error::last_os_error());
                work()
            });
            thread
                .join()
                .unwrap_or_else(|e| std::panic::resume_unwind(e))
        })
    }

    /// Connects it with another by a veth pair, both ends up, and gives this end these
    /// addresses.
    pub fn connect(&self, name: &str, addresses: &[&str], peer: &Netns, peer_name: &str) {
        let mac = mac_of(addresses.first().copied().unwrap_or(name));
        peer.ip(&format!(
            "link add {peer_name} type veth peer name {name} address {mac} netns {}",
            self.name
        ));
        self.address(name, addresses);
        self.ip(&format!("link set {name} up"));
        peer.ip(&format!("link set {peer_name} up"));
    }

    /// Gives an interface addresses that can be used at once.
    pub fn address(&self, name: &str, addresses: &[&str]) {
        for address in addresses {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            self.ip(&format!("addr add {address} dev {name}{nodad}"));
        }
    }

    /// Answers in it every question for an address with 192.0.2.7, at port 53 of this
    /// address, for as long as the process lives.
    ///
    /// # Panics
    /// When the port is in use.
    pub fn name_server(&self, address: impl Into<IpAddr>) {
        let address = (address.into(), 53);
        let (datagrams, connections) = self.enter(|| {
            (
                UdpSocket::bind(address).expect("port 53"),
                TcpListener::bind(address).expect("port 53"),
            )
        });
        std::thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((len, client)) = datagrams.recv_from(&mut query) {
                // Who asked may be gone.
                let _ = datagrams.send_to(&answer(&query[..len]), client);
            }
        });
        std::thread::spawn(move || {
            for mut client in connections.incoming().flatten() {
                let mut len = [0; 2];
                client.read_exact(&mut len).expect("a length");
                let mut query = vec![0; u16::from_be_bytes(len).into()];
                client.read_exact(&mut query).expect("a query");
                let answer = answer(&query);
                let len = u16::try_from(answer.len())
                    .expect("a short answer")
                    .to_be_bytes();
                client
                    .write_all(&[&len, &answer[..]].concat())
                    .expect("a client that waits");
            }
        });
    }

    /// Names of its interfaces without the loopback.
    #[must_use]
    pub fn links(&self) -> Vec<String> {
        let names = self.ip("-o link");
        let names = names
            .lines()
            .filter_map(|line| line.split([':', '@']).nth(1));
        names
            .map(|name| name.trim().to_owned())
            .filter(|name| name != "lo")
            .collect()
    }

    /// Whether traffic control does anything at the ingress of an interface.
    #[must_use]
    pub fn has_filters(&self, name: &str) -> bool {
        let qdiscs = self.exec("tc", &format!("qdisc show dev {name}"));
        qdiscs.ok().stdout().contains("ingress")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // What is left is found by the leak check.
        let _ = tool("ip", ["netns", "del", &self.name]);
    }
}

/// RFC 1035, section 4: header and question, then one record if the question is for an
/// address of IPv4.
fn answer(query: &[u8]) -> Vec<u8> {
    let name = query[12..].iter().position(|byte| *byte == 0);
    let name = name.expect("a name");
    let question = &query[12..12 + name + 5];
    let is_v4 = question[name + 1..name + 3] == [0, 1];
    let mut answer = query[..2].to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_v4), 0, 0, 0, 0]);
    answer.extend(question);
    if is_v4 {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
    }
    answer
}

/// A hardware address made of a text, so that each end of a test has its own.
fn mac_of(text: &str) -> String {
    let sum = text.bytes().fold(7u32, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(byte.into())
    });
    let [a, b, c, d] = sum.to_be_bytes();
    format!("02:77:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

fn tool<'a>(name: &str, args: impl IntoIterator<Item = &'a str>) -> Output {
    Invocation::new(Path::new(name))
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(args)
        .output()
}

/// Inside a container: sends back what arrives on TCP port 80 and UDP port 53, of
/// both IP versions, until it is killed.
///
/// # Panics
/// When it cannot listen.
pub(crate) fn echo() {
    let tcp = TcpListener::bind("[::]:80").expect("port 80");
    let udp = UdpSocket::bind("[::]:53").expect("port 53");
    println!("listening");
    std::thread::spawn(move || send_back(&udp));
    for stream in tcp.incoming().flatten() {
        std::thread::spawn(move || {
            let mut back = stream.try_clone().expect("a descriptor");
            // The other end notices when less comes back.
            let _ = io::copy(&mut &stream, &mut back);
            let _ = back.shutdown(Shutdown::Write);
        });
    }
}

/// The same for UDP only, at this address.
///
/// # Panics
/// When it cannot listen.
pub(crate) fn echo_datagrams(address: &str) {
    let udp = UdpSocket::bind(address).expect("the address");
    println!("listening");
    send_back(&udp);
}

/// Asks a name server by sockets of IPv6: who has answered, and the address.
///
/// # Panics
/// When there is no answer.
pub(crate) fn ask_by_ipv6(server: Ipv4Addr) {
    const QUESTION: &[u8] = b"\x01\x02\x01\0\0\x01\0\0\0\0\0\0\x04some\x03org\0\0\x01\0\x01";
    let server = SocketAddr::from((server.to_ipv6_mapped(), 53));
    let print = |way: &str, from: SocketAddr, answer: &[u8]| {
        let [.., a, b, c, d] = *answer else {
            panic!("a short answer");
        };
        println!("{way}={from} {}", Ipv4Addr::new(a, b, c, d));
    };
    let socket = || {
        let socket = UdpSocket::bind("[::]:0").expect("a socket of IPv6");
        let time = Some(Duration::from_secs(10));
        socket.set_read_timeout(time).expect("a time");
        socket
    };
    let mut answer = [0; 512];
    let unconnected = socket();
    unconnected.send_to(QUESTION, server).expect("a question");
    let (len, from) = unconnected.recv_from(&mut answer).expect("an answer");
    print("unconnected", from, &answer[..len]);
    let connected = socket();
    connected.connect(server).expect("a server");
    connected.send(QUESTION).expect("a question");
    let len = connected.recv(&mut answer).expect("an answer");
    print(
        "connected",
        connected.peer_addr().expect("a peer"),
        &answer[..len],
    );
    let mut tcp = TcpStream::connect(server).expect("a server");
    let len = u16::try_from(QUESTION.len()).expect("a short question");
    tcp.write_all(&[&len.to_be_bytes(), QUESTION].concat())
        .expect("a question");
    let mut len = [0; 2];
    tcp.read_exact(&mut len).expect("a length");
    let mut answer = vec![0; u16::from_be_bytes(len).into()];
    tcp.read_exact(&mut answer).expect("an answer");
    print("tcp", tcp.peer_addr().expect("a peer"), &answer);
    println!("done");
}

fn send_back(udp: &UdpSocket) {
    let mut datagram = [0; 65_536];
    while let Ok((length, from)) = udp.recv_from(&mut datagram) {
        // A peer that is gone has no use for the answer.
        let _ = udp.send_to(&datagram[..length], from);
    }
}

impl Bundle {
    /// Puts the container into a network namespace, with the rights to look at it.
    #[must_use]
    pub fn network(self, path: &Path) -> Self {
        let path = path.to_owned();
        self.with(|c| {
            let namespaces = c["linux"]["namespaces"].as_array_mut().expect("namespaces");
            for namespace in namespaces.iter_mut().filter(|n| n["type"] == "network") {
                namespace["path"] = serde_json::json!(path);
            }
        })
        .capabilities(&["CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"])
    }
}
