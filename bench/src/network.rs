//! TCP through a container's network beside a bare tap: two cards of one VM, so that
//! guest, kernel and hypervisor are the same.
//!
//! `eth0` is what an engine makes: a veth whose other end is in the peer's namespace,
//! tied to the VM by the runtime. The bare one was tied in the same way and is taken
//! apart: its tap has the peer's address itself, with no filter, no veth and no second
//! network stack behind it.
//!
//! The peer in the guest is this binary again ([`main`]).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use kuasar_runv_test_harness::{Flavour, Netns, Runtime, SHORT, World, json, wait_until};

use crate::report::{Row, Section, Target, Verdict};
use crate::sample::Samples;

/// Environment variable that makes this binary the peer.
const VARIABLE: &str = "KUASAR_RUNV_BENCH_PEER";
const PORT: u16 = 4321;
/// Least of the network beside the bare tap.
const TARGET: f64 = 0.95;

/// Bytes of one transfer, and requests of one series.
const TRANSFER: u64 = 64 << 20;
const REQUESTS: u64 = 1000;
const BLOCK: usize = 64 << 10;
/// Turns of a round: a transfer takes a quarter of a second, in which a busy machine
/// has time for something else with one of the two. Single figures differ by a factor of
/// two; the medians of a hundred by a few parts in a hundred.
const TURNS: u32 = 12;
const MIB: f64 = (1 << 20) as f64;

pub fn is_wanted() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// In the guest: obeys each connection's first line, `send N`, `receive N` (bytes) or
/// `echo N` (single bytes, one after the other), until it is killed.
pub fn main() {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).expect("the port is free");
    println!("listening");
    for stream in listener.incoming().flatten() {
        // A peer that is gone is measured as that.
        if let Err(e) = obey(stream) {
            eprintln!("{e}");
        }
    }
}

fn obey(stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(BLOCK, stream.try_clone()?);
    let mut writer = stream;
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let (order, count) = line.trim().split_once(' ').unwrap_or(("", "0"));
    let count: u64 = count.parse().map_err(io::Error::other)?;
    match order {
        "send" => send(&mut writer, count),
        "receive" => {
            receive(&mut reader, count)?;
            writer.write_all(b".")
        }
        "echo" => {
            for _ in 0..count {
                let mut byte = [0];
                reader.read_exact(&mut byte)?;
                writer.write_all(&byte)?;
            }
            Ok(())
        }
        other => Err(io::Error::other(format!("no order {other:?}"))),
    }
}

fn send(to: &mut impl Write, mut bytes: u64) -> io::Result<()> {
    let block = [b'x'; BLOCK];
    while bytes > 0 {
        let len = bytes.min(BLOCK as u64);
        to.write_all(&block[..len as usize])?;
        bytes -= len;
    }
    Ok(())
}

fn receive(from: &mut impl Read, bytes: u64) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    let mut left = bytes;
    while left > 0 {
        let got = from.read(&mut block)? as u64;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= got;
    }
    Ok(())
}

/// One of the two ways to the guest.
struct Way<'w> {
    from: &'w Netns,
    to: SocketAddr,
    /// MiB/s from the guest, MiB/s to it, requests per second.
    samples: [Samples; 3],
}

pub fn measure(rounds: u32) -> Section {
    let world = World::with(Runtime::built(), Flavour::Source);
    let (inner, outer) = (Netns::new(&world, "in"), Netns::new(&world, "out"));
    inner.connect("eth0", &["10.77.0.2/24"], &outer, "veth0");
    outer.address("veth0", &["10.77.0.1/24"]);
    inner.connect("eth1", &[], &outer, "veth1");
    let bundle = world
        .bundle()
        .args(["/bin/peer"])
        .network(&inner.path())
        .with(|c| {
            let env = c["process"]["env"].as_array_mut().expect("env");
            env.push(json!(format!("{VARIABLE}=1")));
        });
    let program = std::env::current_exe().expect("/proc is mounted");
    std::fs::copy(program, bundle.rootfs().join("bin/peer")).expect("rootfs is writable");
    let container = world.start(&bundle, "c");
    wait_until("the peer", SHORT * 3, || {
        container.stdout().contains("listening")
    });
    // The container's own address, which the namespace does not know.
    let _ = container
        .exec_sh(
            &["--cap", "CAP_NET_ADMIN"],
            "ip addr add 10.78.0.2/24 dev eth1",
        )
        .ok();
    bare(&inner, "eth1");

    let mut ways = [(&outer, "10.77.0.2"), (&inner, "10.78.0.2")].map(|(from, to)| Way {
        from,
        to: format!("{to}:{PORT}").parse().expect("an address"),
        samples: Default::default(),
    });
    for turn in 0..=rounds * TURNS {
        eprint!("\rnetwork: turn {turn} of {} ", rounds * TURNS);
        // Who begins alternates as well.
        let first = turn as usize % 2;
        for index in [first, 1 - first] {
            let way = &mut ways[index];
            let figures = figures(way);
            // The first turn only warms up.
            if turn > 0 {
                for (samples, figure) in way.samples.iter_mut().zip(figures) {
                    samples.add(figure);
                }
            }
        }
    }
    eprintln!();
    section(ways.map(|way| way.samples))
}

/// Takes the tap of an interface apart from it, and gives it the peer's address.
fn bare(inner: &Netns, interface: &str) {
    let taps: Vec<_> = inner
        .links()
        .into_iter()
        .filter(|name| name.starts_with("runv"))
        .collect();
    let redirects = inner
        .exec("tc", &format!("filter show dev {interface} ingress"))
        .ok()
        .stdout();
    let tap = taps
        .iter()
        .find(|tap| redirects.contains(&format!("to device {tap}")))
        .unwrap_or_else(|| panic!("{interface} has no tap among {taps:?}: {redirects}"));
    for name in [interface, tap] {
        let _ = inner
            .exec("tc", &format!("qdisc del dev {name} ingress"))
            .ok();
    }
    inner.ip(&format!("addr add 10.78.0.1/24 dev {tap}"));
}

fn figures(way: &Way<'_>) -> [f64; 3] {
    let (to, from) = (way.to, way.from);
    from.enter(|| {
        let rate = |elapsed: Duration| TRANSFER as f64 / MIB / elapsed.as_secs_f64();
        let sent = timed(to, &format!("send {TRANSFER}"), |stream| {
            receive(stream, TRANSFER)
        });
        let received = timed(to, &format!("receive {TRANSFER}"), |stream| {
            send(stream, TRANSFER)?;
            receive(stream, 1)
        });
        let echoed = timed(to, &format!("echo {REQUESTS}"), |stream| {
            for _ in 0..REQUESTS {
                stream.write_all(b"?")?;
                receive(stream, 1)?;
            }
            Ok(())
        });
        let requests = REQUESTS as f64 / echoed.as_secs_f64();
        [rate(sent), rate(received), requests]
    })
}

/// How long the work takes once the connection is there.
fn timed(
    to: SocketAddr,
    order: &str,
    work: impl FnOnce(&mut TcpStream) -> io::Result<()>,
) -> Duration {
    let mut stream = TcpStream::connect_timeout(&to, SHORT).expect("the peer listens");
    stream.set_nodelay(true).expect("a TCP socket");
    stream
        .set_read_timeout(Some(SHORT * 6))
        .expect("a time-out");
    let started = Instant::now();
    writeln!(stream, "{order}").expect("the peer reads");
    work(&mut stream).expect("the peer does its part");
    started.elapsed()
}

fn section([network, bare]: [[Samples; 3]; 2]) -> Section {
    const NAMES: [(&str, &str); 3] = [
        ("TCP from the guest", "MiB/s"),
        ("TCP to the guest", "MiB/s"),
        ("requests", "1/s"),
    ];
    let mut section = Section {
        title: "Network: a container's network, and a bare tap of the same VM".into(),
        rows: Vec::new(),
        verdicts: Vec::new(),
    };
    for (((name, unit), network), bare) in NAMES.into_iter().zip(network).zip(bare) {
        section.verdicts.push(Verdict {
            name: format!("{name}, network / bare tap"),
            value: network.median() / bare.median(),
            unit: "",
            target: Target::AtLeast(TARGET),
        });
        section
            .rows
            .push(Row::new(format!("{name}, network"), unit, network));
        section
            .rows
            .push(Row::new(format!("{name}, bare tap"), unit, bare));
    }
    section
}
