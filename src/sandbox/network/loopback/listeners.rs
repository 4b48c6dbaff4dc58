//! Listening on the ports that the guest listens on.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kuasar_runv_protocol::loopback::{Port, Protocol, Purpose, Request, decode_ports};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use rustix::thread::CapabilitySet;

use super::datagrams::Datagrams;
use super::{CAPABILITIES, Way, packet};
use crate::sandbox::relay::relay;
use crate::sys::capabilities::limit_to;
use crate::sys::seqpacket::wait_any_readable;
use crate::sys::wake::Wake;

/// Most connections of one container at the same time; more wait to be accepted.
const MAX_CONNECTIONS: usize = 128;
/// How long the container has its VM to itself before the guest is asked: what it has to
/// do then would be in the way of the program that starts just now.
const HEAD_START: Duration = Duration::from_millis(100);
/// How often the guest may say something.
const INTERVAL: Duration = Duration::from_millis(50);
const STACK_SIZE: usize = 128 * 1024;
/// After a connection that could not be accepted.
const RETRY: Duration = Duration::from_millis(100);
/// Bytes that are read at once.
const CHUNK: usize = 1024;

/// The thread that listens. It ends with this value, and so do the connections.
pub struct Listeners {
    stop: Arc<Wake>,
}

impl Listeners {
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(way: Way) -> io::Result<Listeners> {
        let stop = Arc::new(Wake::new()?);
        let connections = Arc::new(Connections {
            count: AtomicUsize::new(0),
            ended: Wake::new()?,
            stop: Arc::clone(&stop),
        });
        std::thread::Builder::new()
            .name("loopback".into())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let container = way.container.clone();
                let ended = limit_to(CAPABILITIES).and_then(|()| listen(way, connections));
                if let Err(e) = ended {
                    log::debug!("the ports of {container}: {e}");
                }
            })?;
        Ok(Listeners { stop })
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        if let Err(e) = self.stop.wake() {
            log::warn!("ending the listeners of a container: {e}");
        }
    }
}

/// What the thread and its connections share.
struct Connections {
    count: AtomicUsize,
    /// Readable when one has ended.
    ended: Wake,
    stop: Arc<Wake>,
}

/// The guest's news, as far as they have been read.
struct News {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// When it may be read again.
    next: Instant,
}

impl News {
    /// The newest set of ports that is complete.
    fn receive(&mut self) -> io::Result<Option<BTreeSet<Port>>> {
        let mut chunk = [0; CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        let mut newest = None;
        let invalid = |e| io::Error::new(io::ErrorKind::InvalidData, e);
        while let Some((ports, len)) = decode_ports(&self.buffer).map_err(invalid)? {
            self.buffer.drain(..len);
            newest = Some(ports);
        }
        if newest.is_some() {
            self.next = Instant::now() + INTERVAL;
        }
        Ok(newest)
    }
}

fn listen(way: Way, connections: Arc<Connections>) -> io::Result<()> {
    if wait_any_readable(&[connections.stop.as_fd()], HEAD_START)?[0] {
        return Ok(());
    }
    let stream = way.guest()?.loopback(&Request {
        purpose: Purpose::Listeners,
        container_id: way.container.clone(),
    })?;
    let mut news = News {
        stream,
        buffer: Vec::new(),
        next: Instant::now(),
    };
    let mut listeners = BTreeMap::new();
    let mut datagrams = Datagrams::new();
    loop {
        let ready = wait(&news, &listeners, &datagrams, &connections)?;
        if ready.contains(&Source::Stop) {
            return Ok(());
        }
        connections.ended.reset()?;
        datagrams.expire(Instant::now());
        for source in ready {
            match source {
                Source::Stop | Source::Ended => {}
                Source::Listener(port) => {
                    if let Some(listener) = listeners.get(&port) {
                        accept(listener, &way, &connections);
                    }
                }
                Source::Datagrams(port) => datagrams.receive(port, &way),
                Source::Guest => datagrams.go_on(),
                Source::News => {
                    if let Some(ports) = news.receive()? {
                        follow(&mut listeners, &ports);
                        datagrams.follow(&ports);
                    }
                }
            }
        }
    }
}

/// What the thread waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Stop,
    /// A connection has.
    Ended,
    Listener(Port),
    Datagrams(Port),
    /// The connection that datagrams go by.
    Guest,
    News,
}

/// What is ready; nothing when it is time to look at the sessions.
fn wait(
    news: &News,
    listeners: &BTreeMap<Port, TcpListener>,
    datagrams: &Datagrams,
    connections: &Connections,
) -> io::Result<Vec<Source>> {
    let readable = |source, fd| (source, fd, PollFlags::IN);
    let mut watched: Vec<(Source, BorrowedFd<'_>, PollFlags)> = vec![
        readable(Source::Stop, connections.stop.as_fd()),
        readable(Source::Ended, connections.ended.as_fd()),
    ];
    if connections.count.load(Ordering::Acquire) < MAX_CONNECTIONS {
        let listeners = listeners.iter();
        watched.extend(listeners.map(|(port, fd)| readable(Source::Listener(*port), fd.as_fd())));
    }
    watched.extend(
        datagrams
            .ports()
            .map(|(port, fd)| readable(Source::Datagrams(port), fd)),
    );
    watched.extend(datagrams.guest().map(|(fd, is_full)| {
        let flags = match is_full {
            true => PollFlags::IN | PollFlags::OUT,
            false => PollFlags::IN,
        };
        (Source::Guest, fd, flags)
    }));
    let now = Instant::now();
    let mut until = datagrams.deadline();
    if news.next <= now {
        watched.push(readable(Source::News, news.stream.as_fd()));
    } else {
        until = Some(until.map_or(news.next, |until| until.min(news.next)));
    }
    let timeout = until.map(|until| {
        let pause = until.saturating_duration_since(now);
        Timespec {
            // Two minutes at most.
            tv_sec: pause.as_secs().cast_signed(),
            tv_nsec: pause.subsec_nanos().into(),
        }
    });
    let mut fds: Vec<_> = watched
        .iter()
        .map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
        .collect();
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) => {}
        Err(Errno::INTR) => fds.iter_mut().for_each(PollFd::clear_revents),
        Err(e) => return Err(e.into()),
    }
    let ready = watched.iter().zip(&fds);
    let ready = ready.filter(|(_, fd)| !fd.revents().is_empty());
    Ok(ready.map(|((source, ..), _)| *source).collect())
}

/// Listens on those of these ports that are TCP's, and no others.
fn follow(listeners: &mut BTreeMap<Port, TcpListener>, ports: &BTreeSet<Port>) {
    listeners.retain(|port, _| ports.contains(port));
    for port in ports.iter().filter(|port| port.protocol == Protocol::Tcp) {
        if listeners.contains_key(port) {
            continue;
        }
        match packet::listen(*port) {
            Ok(listener) => drop(listeners.insert(*port, listener)),
            // Somebody on the host has it, or there is no IPv6.
            Err(e) => log::debug!("listening on {}: {e}", port.socket_address()),
        }
    }
}

fn accept(listener: &TcpListener, way: &Way, connections: &Arc<Connections>) {
    let accepted = listener.accept().and_then(|(stream, _)| {
        // Listeners have more than one address.
        let asked = stream.local_addr()?;
        Ok((stream, asked))
    });
    let (stream, asked) = match accepted {
        Ok(accepted) => accepted,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
        Err(e) => {
            log::warn!("accepting a connection: {e}");
            // EMFILE: the listener stays ready until some have ended.
            std::thread::sleep(RETRY);
            return;
        }
    };
    let port = Port {
        protocol: Protocol::Tcp,
        address: asked.ip(),
        number: asked.port(),
    };
    let way = way.clone();
    let connection = Connection::new(connections);
    let spawned = std::thread::Builder::new()
        .name("loopback".into())
        .stack_size(STACK_SIZE)
        .spawn(move || {
            let ended = limit_to(CapabilitySet::empty())
                .and_then(|()| connect(&stream, port, &way, &connection.0.stop));
            if let Err(e) = ended {
                log::debug!("a connection to {asked}: {e}");
                // Reset, as by a port that nobody listens on.
                let _ = set_socket_linger(&stream, Some(Duration::ZERO));
            }
            drop(stream);
            drop(connection);
        });
    if let Err(e) = spawned {
        log::warn!("a thread for a connection: {e}");
    }
}

fn connect(client: &TcpStream, port: Port, way: &Way, stop: &Wake) -> io::Result<()> {
    client.set_nodelay(true)?;
    let server = way.guest()?.loopback(&Request {
        purpose: Purpose::Connect(port),
        container_id: way.container.clone(),
    })?;
    relay(client, &server, Some(stop))
}

/// Counts while it exists.
struct Connection(Arc<Connections>);

impl Connection {
    fn new(all: &Arc<Connections>) -> Connection {
        all.count.fetch_add(1, Ordering::AcqRel);
        Connection(Arc::clone(all))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::AcqRel);
        if let Err(e) = self.0.ended.wake() {
            log::warn!("the end of a connection: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kuasar_runv_protocol::loopback::encode_ports;
    use std::io::Write;
    use std::net::Ipv4Addr;

    fn port(number: u16) -> Port {
        Port {
            protocol: Protocol::Tcp,
            address: Ipv4Addr::LOCALHOST.into(),
            number,
        }
    }

    #[test]
    fn the_newest_of_several_news_counts_and_then_there_is_a_pause() {
        let (stream, mut guest) = UnixStream::pair().unwrap();
        let mut news = News {
            stream,
            buffer: Vec::new(),
            next: Instant::now(),
        };
        let set = |number| BTreeSet::from([port(number)]);
        let bytes = [encode_ports(&set(80)), encode_ports(&set(81))].concat();
        guest.write_all(&bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(news.receive().unwrap(), Some(set(80)));
        assert!(news.next > Instant::now());
        guest.write_all(&bytes[bytes.len() - 1..]).unwrap();
        assert_eq!(news.receive().unwrap(), Some(set(81)));
        guest.write_all(&[255, 255]).unwrap();
        assert!(news.receive().is_err());
        drop(guest);
        assert!(news.receive().is_err());
    }

    #[test]
    fn ports_are_listened_on_while_the_guest_does() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let number = free.local_addr().unwrap().port();
        drop(free);
        let port = port(number);
        let mut listeners = BTreeMap::new();
        follow(&mut listeners, &[port].into());
        TcpStream::connect(port.socket_address()).unwrap();
        follow(&mut listeners, &BTreeSet::new());
        assert!(TcpStream::connect(port.socket_address()).is_err());
    }
}
