//! A name server of an engine, which is on the host, at its address in the container.
//!
//! Datagrams and connections for port 53 of the address are led to sockets of the
//! agent's ([`redirect`](super::redirect)); each query goes to the host and its answer
//! back to who asked.

use std::collections::HashMap;
use std::io;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kuasar_runv_protocol::loopback::{DNS_PORT, MAX_DNS_MESSAGE, QUERY_PREFIX_LEN, Query};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::in_namespace;
use super::redirect::Redirect;
use crate::streams::Connection;
use crate::sys;

/// Most queries, and connections for queries, at the same time; more are not answered.
const MAX_QUERIES: usize = 64;
/// How long the host may take over an answer; clients ask again after 5 s.
const ANSWER_DEADLINE: Duration = Duration::from_secs(15);
/// How long a client may keep a connection without asking.
const IDLE_DEADLINE: Duration = Duration::from_secs(10);
/// Attempts to find a port that is free for datagrams and for connections.
const ATTEMPTS: u32 = 16;

/// The sockets of a name server.
pub struct Server {
    datagrams: UdpSocket,
    connections: TcpListener,
    /// The redirection stands while these are open.
    _links: Vec<OwnedFd>,
}

impl Server {
    /// # Errors
    /// Of the sockets, and of bpf(2).
    pub async fn bind(namespace: OwnedFd, address: Ipv4Addr) -> io::Result<Server> {
        let (datagrams, connections, cookie) = in_namespace(namespace, move || {
            let (datagrams, connections) = bind(address)?;
            let cookie = namespace_cookie(&datagrams)?;
            Ok((datagrams, connections, cookie))
        })
        .await?;
        datagrams.set_nonblocking(true)?;
        connections.set_nonblocking(true)?;
        let redirect = Redirect {
            address,
            from: DNS_PORT,
            to: datagrams.local_addr()?.port(),
            namespace: cookie,
        };
        Ok(Server {
            datagrams: UdpSocket::from_std(datagrams)?,
            connections: TcpListener::from_std(connections)?,
            _links: redirect.establish()?,
        })
    }

    /// Serves until the host hangs up.
    ///
    /// # Errors
    /// Of the connection to the host.
    pub async fn serve(self, host: Connection) -> io::Result<()> {
        let host = Arc::new(Host::new(host));
        let datagrams = Arc::new(self.datagrams);
        let room = Arc::new(Semaphore::new(MAX_QUERIES));
        // Dropped with this function, which ends them.
        let mut tasks = JoinSet::new();
        let mut buffer = vec![0; MAX_DNS_MESSAGE];
        let answers = host.take_answers();
        tokio::pin!(answers);
        loop {
            // Those that have ended.
            while tasks.try_join_next().is_some() {}
            tokio::select! {
                ended = &mut answers => return ended,
                received = datagrams.recv_from(&mut buffer) => {
                    // An error of a datagram that was sent before.
                    let Ok((len, client)) = received else { continue };
                    let Ok(permit) = Arc::clone(&room).try_acquire_owned() else { continue };
                    let (host, datagrams) = (Arc::clone(&host), Arc::clone(&datagrams));
                    let message = buffer[..len].to_vec();
                    tasks.spawn(async move {
                        if let Some(reply) = host.ask(false, message).await {
                            // The client asks again.
                            let _ = datagrams.send_to(&reply, client).await;
                        }
                        drop(permit);
                    });
                }
                accepted = self.connections.accept() => {
                    let Ok((stream, _)) = accepted else { continue };
                    let Ok(permit) = Arc::clone(&room).try_acquire_owned() else { continue };
                    let host = Arc::clone(&host);
                    tasks.spawn(async move {
                        if let Err(e) = serve_connection(stream, &host).await {
                            log::debug!("a connection to a name server: {e}");
                        }
                        drop(permit);
                    });
                }
            }
        }
    }
}

/// Two sockets with the same port.
fn bind(address: Ipv4Addr) -> io::Result<(std::net::UdpSocket, std::net::TcpListener)> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        let datagrams = std::net::UdpSocket::bind((address, 0))?;
        match std::net::TcpListener::bind((address, datagrams.local_addr()?.port())) {
            Ok(connections) => return Ok((datagrams, connections)),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && attempt < ATTEMPTS => {}
            Err(e) => return Err(e),
        }
    }
}

/// Messages with their length in front (RFC 1035, section 4.2.2), one after the other.
async fn serve_connection(mut stream: TcpStream, host: &Host) -> io::Result<()> {
    loop {
        let Ok(len) = timeout(IDLE_DEADLINE, stream.read_u16()).await else {
            return Ok(());
        };
        let mut message = vec![0; usize::from(len?)];
        match timeout(IDLE_DEADLINE, stream.read_exact(&mut message)).await {
            Ok(read) => drop(read?),
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
        let Some(reply) = host.ask(true, message).await else {
            return Ok(());
        };
        let len = u16::try_from(reply.len()).map_err(io::Error::other)?;
        stream.write_u16(len).await?;
        stream.write_all(&reply).await?;
    }
}

/// The connection to the host, and the queries that it has not answered.
struct Host {
    connection: Connection,
    /// Held while a query is written.
    writing: tokio::sync::Mutex<()>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    last: u32,
    queries: HashMap<u32, oneshot::Sender<Vec<u8>>>,
}

impl Host {
    fn new(connection: Connection) -> Host {
        Host {
            connection,
            writing: tokio::sync::Mutex::new(()),
            waiting: Mutex::default(),
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer to a query, if there is one in time.
    async fn ask(&self, is_tcp: bool, message: Vec<u8>) -> Option<Vec<u8>> {
        let (sender, answer) = oneshot::channel();
        let number = {
            let mut waiting = self.waiting();
            waiting.last = waiting.last.wrapping_add(1);
            let number = waiting.last;
            waiting.queries.insert(number, sender);
            number
        };
        let query = Query {
            number,
            is_tcp,
            message,
        };
        let answer = match self.send(&query).await {
            Ok(()) => timeout(ANSWER_DEADLINE, answer).await.ok()?.ok(),
            Err(e) => {
                log::debug!("asking the host: {e}");
                None
            }
        };
        self.waiting().queries.remove(&number);
        answer.filter(|message| !message.is_empty())
    }

    async fn send(&self, query: &Query) -> io::Result<()> {
        let bytes = query.encode().map_err(io::Error::other)?;
        let _writing = self.writing.lock().await;
        self.connection.write_all(&bytes).await
    }

    /// Hands the host's answers out until it hangs up.
    async fn take_answers(&self) -> io::Result<()> {
        loop {
            let mut prefix = [0; QUERY_PREFIX_LEN];
            match self.connection.read_exact(&mut prefix).await {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            }
            let (answer, len) = Query::decode_prefix(prefix);
            let mut message = vec![0; len];
            self.connection.read_exact(&mut message).await?;
            if let Some(waits) = self.waiting().queries.remove(&answer.number) {
                // Who asked may have given up.
                let _ = waits.send(message);
            }
        }
    }
}

/// Names the network namespace of a socket (`SO_NETNS_COOKIE`, socket(7)).
fn namespace_cookie(socket: &impl AsRawFd) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option stores a u64.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    sys::check(got.into())?;
    Ok(cookie)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    /// A server without a redirection, at a port of its own, whose host answers with
    /// what was asked and how, and to "none" with nothing.
    fn with_server(client: impl FnOnce(std::net::SocketAddr) + Send + 'static) {
        let (datagrams, connections) = bind(Ipv4Addr::LOCALHOST).unwrap();
        let address = datagrams.local_addr().unwrap();
        let (host, ours) = UnixStream::pair().unwrap();
        let mut replies = host.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut queries = host;
            while let Ok(mut query) = Query::read(&mut queries) {
                let how = if query.is_tcp { "tcp:" } else { "udp:" };
                match query.message.as_slice() {
                    b"none" => query.message.clear(),
                    _ => drop(query.message.splice(..0, how.bytes())),
                }
                queries.write_all(&query.encode().unwrap()).unwrap();
            }
        });
        let clients = std::thread::spawn(move || {
            client(address);
            replies.shutdown(std::net::Shutdown::Both).unwrap();
            replies.read_to_end(&mut Vec::new()).unwrap();
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            for socket in [
                datagrams.set_nonblocking(true),
                connections.set_nonblocking(true),
            ] {
                socket.unwrap();
            }
            let server = Server {
                datagrams: UdpSocket::from_std(datagrams).unwrap(),
                connections: TcpListener::from_std(connections).unwrap(),
                _links: Vec::new(),
            };
            let connection = Connection::new(ours.into()).unwrap();
            // The host hangs up with half of nothing, or in the middle.
            let _ = server.serve(connection).await;
        });
        clients.join().unwrap();
    }

    #[test]
    fn datagrams_are_answered_to_who_asked() {
        with_server(|address| {
            let clients: Vec<_> = (0..3)
                .map(|_| std::net::UdpSocket::bind("127.0.0.1:0").unwrap())
                .collect();
            for (i, client) in clients.iter().enumerate() {
                client.send_to(format!("q{i}").as_bytes(), address).unwrap();
            }
            for (i, client) in clients.iter().enumerate() {
                let mut buffer = [0; 100];
                client
                    .set_read_timeout(Some(Duration::from_secs(20)))
                    .unwrap();
                let (len, from) = client.recv_from(&mut buffer).unwrap();
                assert_eq!(buffer[..len], *format!("udp:q{i}").as_bytes());
                assert_eq!(from, address);
            }
        });
    }

    #[test]
    fn connections_ask_one_after_the_other_and_close_without_an_answer() {
        with_server(|address| {
            let mut client = std::net::TcpStream::connect(address).unwrap();
            for question in ["a", "bc"] {
                let len = u16::try_from(question.len()).unwrap().to_be_bytes();
                client.write_all(&len).unwrap();
                client.write_all(question.as_bytes()).unwrap();
                let mut reply = vec![0; 2 + 4 + question.len()];
                client.read_exact(&mut reply).unwrap();
                assert_eq!(reply[2..], *format!("tcp:{question}").as_bytes());
            }
            client.write_all(b"\0\x04none").unwrap();
            assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0);
        });
    }

    #[test]
    fn a_namespace_has_a_number() {
        let (datagrams, connections) = bind(Ipv4Addr::LOCALHOST).unwrap();
        let cookie = namespace_cookie(&datagrams).unwrap();
        assert_ne!(cookie, 0);
        assert_eq!(cookie, namespace_cookie(&connections).unwrap());
    }
}
