//! A name server of an engine in the network namespace: what the guest asks is asked
//! from here.
//!
//! The address is that of the server's socket. The port is that of the protocol: docker's
//! server has another one, and rules of the namespace that lead to it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kuasar_runv_protocol::loopback::{DNS_PORT, MAX_DNS_MESSAGE, Purpose, Query, Request};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::Way;
use crate::sys::capabilities::limit_to;

/// How long the server may take. It has others to ask.
const DEADLINE: Duration = Duration::from_secs(12);
/// How long the guest may take to read an answer.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// Most queries at the same time; more get no answer.
const MAX_QUERIES: usize = 64;
/// Most name servers in a namespace.
const MAX_SERVERS: usize = 4;
/// Most bytes that are read of the list of sockets.
const MAX_FILE: u64 = 64 * 1024;
const STACK_SIZE: usize = 64 * 1024;

/// The thread that asks. It ends with this value.
pub struct Resolver {
    guest: UnixStream,
}

impl Resolver {
    /// Has the guest ask us what it is asked at `address`. Returns when the guest is
    /// ready for it.
    ///
    /// # Errors
    /// When the guest cannot, or the thread cannot be started.
    pub fn start(way: &Way, address: Ipv4Addr) -> io::Result<Resolver> {
        let guest = way.guest()?.loopback(&Request {
            purpose: Purpose::Resolve(address),
            container_id: way.container.clone(),
        })?;
        guest.set_write_timeout(Some(WRITE_DEADLINE))?;
        let queries = guest.try_clone()?;
        std::thread::Builder::new()
            .name("resolver".into())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let server = SocketAddr::from((address, DNS_PORT));
                let ended = limit_to(CapabilitySet::empty()).and_then(|()| serve(queries, server));
                if let Err(e) = ended {
                    log::debug!("the name server {address}: {e}");
                }
            })?;
        log::info!("the name server {address} of the network namespace serves the guest");
        Ok(Resolver { guest })
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        // The guest may have hung up before.
        let _ = self.guest.shutdown(Shutdown::Both);
    }
}

/// Asks what the guest asks until one of the two sides hangs up.
fn serve(mut queries: UnixStream, server: SocketAddr) -> io::Result<()> {
    let answers = Arc::new(Mutex::new(queries.try_clone()?));
    loop {
        let query = Query::read(&mut queries)?;
        // One count is this thread's own.
        if Arc::strong_count(&answers) > MAX_QUERIES {
            answer(&answers, query.number, query.is_tcp, Vec::new())?;
            continue;
        }
        let answers = Arc::clone(&answers);
        std::thread::Builder::new()
            .name("resolver".into())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let reply = ask(&query, server).unwrap_or_else(|e| {
                    log::debug!("asking {server}: {e}");
                    Vec::new()
                });
                if let Err(e) = answer(&answers, query.number, query.is_tcp, reply) {
                    log::debug!("telling the guest what {server} says: {e}");
                }
            })?;
    }
}

/// A guest that does not read, or has read half, is not served any more.
fn answer(
    answers: &Mutex<UnixStream>,
    number: u32,
    is_tcp: bool,
    message: Vec<u8>,
) -> io::Result<()> {
    let answer = Query {
        number,
        is_tcp,
        message,
    };
    let bytes = answer.encode().map_err(io::Error::other)?;
    let mut stream = answers.lock().unwrap_or_else(PoisonError::into_inner);
    let written = stream.write_all(&bytes);
    if written.is_err() {
        stream.shutdown(Shutdown::Both)?;
    }
    written
}

/// What the server says.
fn ask(query: &Query, server: SocketAddr) -> io::Result<Vec<u8>> {
    if query.is_tcp {
        return ask_by_connection(&query.message, server);
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    socket.send(&query.message)?;
    let mut reply = vec![0; MAX_DNS_MESSAGE];
    let len = socket.recv(&mut reply)?;
    reply.truncate(len);
    Ok(reply)
}

/// RFC 1035, section 4.2.2: the length comes first.
fn ask_by_connection(message: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    let len = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&len.to_be_bytes(), message].concat())?;
    let mut len = [0; 2];
    stream.read_exact(&mut len)?;
    let mut reply = vec![0; usize::from(u16::from_be_bytes(len))];
    stream.read_exact(&mut reply)?;
    Ok(reply)
}

/// The addresses at which there are name servers in the network namespace of the calling
/// thread: those of the loopback network, but for 127.0.0.1, where somebody takes
/// datagrams from everybody. Nobody but an engine has put anything there.
///
/// # Errors
/// Of reading the list of sockets.
pub fn addresses() -> io::Result<BTreeSet<Ipv4Addr>> {
    let file = File::open("/proc/thread-self/net/udp")?;
    let mut found = BTreeSet::new();
    for line in BufReader::new(file.take(MAX_FILE)).lines().skip(1) {
        if let Some(address) = server(&line?)
            && found.len() < MAX_SERVERS
        {
            found.insert(address);
        }
    }
    Ok(found)
}

/// proc_pid_net(5): number, local address and port, those of the peer.
fn server(line: &str) -> Option<Ipv4Addr> {
    let mut fields = line.split_whitespace().skip(1);
    let (local, peer) = (fields.next()?, fields.next()?);
    let (address, _) = local.split_once(':')?;
    let address = Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?.to_ne_bytes());
    let is_server =
        peer == "00000000:0000" && address.is_loopback() && address != Ipv4Addr::LOCALHOST;
    is_server.then_some(address)
}

/// Has the programs of the network namespace of the calling thread ask from ports from
/// `first` to the last. `proc` is a proc file system that can be written to.
///
/// # Errors
/// Of writing the setting; `Unsupported` without `proc`.
pub fn limit_ports(proc: Option<&OwnedFd>, first: u16) -> io::Result<()> {
    const SETTING: &str = "sys/net/ipv4/ip_local_port_range";
    let proc = proc.ok_or(io::ErrorKind::Unsupported)?;
    let failed = |e: Errno| io::Error::new(io::Error::from(e).kind(), format!("{SETTING}: {e}"));
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = openat(proc, SETTING, flags, Mode::empty()).map_err(failed)?;
    let range = format!("{first} {}", u16::MAX);
    rustix::io::write(&file, range.as_bytes()).map_err(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn servers_are_told_from_other_sockets() {
        for (sockets, expected) in [
            ("0B00007F:8D5A 00000000:0000", Some([127, 0, 0, 11])),
            ("0B00007F:8D5A 0100007F:0035", None),
            ("0100007F:0035 00000000:0000", None),
            ("00000000:0044 00000000:0000", None),
            ("0200A8C0:0035 00000000:0000", None),
        ] {
            let line = format!("  352: {sockets} 07 00000000:00000000 00:00000000 00000000");
            assert_eq!(server(&line), expected.map(Ipv4Addr::from), "{sockets}");
        }
    }

    #[test]
    fn a_socket_of_a_server_is_found() {
        let address = Ipv4Addr::new(127, 0, 0, 111);
        let _server = UdpSocket::bind((address, 0)).unwrap();
        assert!(addresses().unwrap().contains(&address));
    }

    #[test]
    fn queries_are_asked_the_way_they_came() {
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        let server = datagrams.local_addr().unwrap();
        let connections = TcpListener::bind(server).unwrap();
        let servers = std::thread::spawn(move || {
            let mut buffer = [0; 100];
            let (len, client) = datagrams.recv_from(&mut buffer).unwrap();
            datagrams.send_to(&buffer[1..len], client).unwrap();
            let (mut client, _) = connections.accept().unwrap();
            client.read_exact(&mut buffer[..5]).unwrap();
            assert_eq!(buffer[..5], *b"\0\x03abc");
            client.write_all(b"\0\x02bc").unwrap();
        });
        let (guest, ours) = UnixStream::pair().unwrap();
        let serving = std::thread::spawn(move || serve(ours, server));
        for is_tcp in [false, true] {
            let query = Query {
                number: 7,
                is_tcp,
                message: b"abc".to_vec(),
            };
            (&guest).write_all(&query.encode().unwrap()).unwrap();
            let answer = Query::read(&mut &guest).unwrap();
            assert_eq!((answer.number, answer.is_tcp), (7, is_tcp));
            assert_eq!(answer.message, b"bc");
        }
        servers.join().unwrap();
        // Nobody is there any more.
        let query = Query {
            number: 8,
            is_tcp: true,
            message: b"abc".to_vec(),
        };
        (&guest).write_all(&query.encode().unwrap()).unwrap();
        assert!(Query::read(&mut &guest).unwrap().message.is_empty());
        drop(guest);
        assert!(serving.join().unwrap().is_err());
    }
}
