//! Listening on the ports that the guest listens on.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kuasar_runv_protocol::loopback::{Port, Purpose, Request, decode_ports};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use rustix::thread::CapabilitySet;

use super::{CAPABILITIES, Way};
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
    loop {
        let ready = wait(&news, &listeners, &connections)?;
        if ready.stop {
            return Ok(());
        }
        connections.ended.reset()?;
        for port in ready.ports {
            if let Some(listener) = listeners.get(&port) {
                accept(listener, port, &way, &connections);
            }
        }
        if ready.news
            && let Some(ports) = news.receive()?
        {
            follow(&mut listeners, &ports);
        }
    }
}

struct Ready {
    stop: bool,
    news: bool,
    ports: Vec<Port>,
}

fn wait(
    news: &News,
    listeners: &BTreeMap<Port, TcpListener>,
    connections: &Connections,
) -> io::Result<Ready> {
    let mut fds = vec![
        PollFd::from_borrowed_fd(connections.stop.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(connections.ended.as_fd(), PollFlags::IN),
    ];
    let has_room = connections.count.load(Ordering::Acquire) < MAX_CONNECTIONS;
    let watched: Vec<Port> = match has_room {
        true => listeners.keys().copied().collect(),
        false => Vec::new(),
    };
    for port in &watched {
        let fd = listeners[port].as_fd();
        fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
    }
    let pause = news.next.saturating_duration_since(Instant::now());
    let timeout = if pause.is_zero() {
        fds.push(PollFd::from_borrowed_fd(news.stream.as_fd(), PollFlags::IN));
        None
    } else {
        Some(Timespec {
            tv_sec: 0,
            tv_nsec: pause.subsec_nanos().into(),
        })
    };
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) => {}
        Err(Errno::INTR) => fds.iter_mut().for_each(PollFd::clear_revents),
        Err(e) => return Err(e.into()),
    }
    let is_ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
    Ok(Ready {
        stop: is_ready(0),
        news: is_ready(2 + watched.len()),
        ports: (0..watched.len())
            .filter(|index| is_ready(2 + index))
            .map(|index| watched[index])
            .collect(),
    })
}

/// Listens on these ports and no others.
fn follow(listeners: &mut BTreeMap<Port, TcpListener>, ports: &BTreeSet<Port>) {
    listeners.retain(|port, _| ports.contains(port));
    for port in ports {
        if listeners.contains_key(port) {
            continue;
        }
        let bound = TcpListener::bind(port.address())
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
        match bound {
            Ok(listener) => drop(listeners.insert(*port, listener)),
            // Somebody on the host has it, or there is no IPv6.
            Err(e) => log::debug!("listening on {}: {e}", port.address()),
        }
    }
}

fn accept(listener: &TcpListener, port: Port, way: &Way, connections: &Arc<Connections>) {
    let stream = match listener.accept() {
        Ok((stream, _)) => stream,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
        Err(e) => {
            log::warn!("accepting a connection to {}: {e}", port.address());
            // EMFILE: the listener stays ready until some have ended.
            std::thread::sleep(RETRY);
            return;
        }
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
                log::debug!("a connection to {}: {e}", port.address());
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

    #[test]
    fn the_newest_of_several_news_counts_and_then_there_is_a_pause() {
        let (stream, mut guest) = UnixStream::pair().unwrap();
        let mut news = News {
            stream,
            buffer: Vec::new(),
            next: Instant::now(),
        };
        let set = |number| {
            BTreeSet::from([Port {
                is_v6: false,
                number,
            }])
        };
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
        let port = Port {
            is_v6: false,
            number,
        };
        let mut listeners = BTreeMap::new();
        follow(&mut listeners, &[port].into());
        TcpStream::connect(port.address()).unwrap();
        follow(&mut listeners, &BTreeSet::new());
        assert!(TcpStream::connect(port.address()).is_err());
    }
}
