//! Datagrams of the host's clients to UDP ports of a container, and back.
//!
//! One connection carries those of all clients. Each client has a socket of its own here,
//! so that the server can tell them apart; it exists until the host says that it ends.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use kuasar_runv_protocol::loopback::{FRAME_PREFIX_LEN, Frame, MAX_SESSIONS, Port, Protocol, Said};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, oneshot};
use tokio::task::JoinSet;

use super::in_namespace;
use crate::streams::Connection;
use crate::sys;

/// Longest datagram of IPv6; IPv4's is shorter.
const MAX_DATAGRAM: usize = 65_535 - 8;

/// Serves until the host hangs up.
///
/// # Errors
/// Of the connection to the host, and what it says that makes no sense.
pub async fn serve(host: Connection, namespace: OwnedFd) -> io::Result<()> {
    let answers = Arc::new(Answers {
        host: host.clone(),
        buffer: Mutex::new(vec![0; MAX_DATAGRAM]),
    });
    let mut sessions = Sessions {
        namespace,
        open: HashMap::new(),
        tasks: JoinSet::new(),
    };
    loop {
        // Those that have ended.
        while let Some(ended) = sessions.tasks.try_join_next() {
            if let Ok(session) = ended {
                sessions.open.remove(&session);
            }
        }
        let Some(frame) = read_frame(&host).await? else {
            return Ok(());
        };
        let session = frame.session;
        match frame.said {
            Said::Open(port) => {
                if let Err(e) = sessions.begin(session, port, &answers).await {
                    log::debug!("a client of {}: {e}", port.socket_address());
                    answers.end(session).await?;
                }
            }
            Said::Datagram(bytes) => {
                if let Err(e) = sessions.pass_on(session, &bytes) {
                    log::debug!("a datagram of a client: {e}");
                    answers.end(session).await?;
                }
            }
            Said::End => drop(sessions.open.remove(&session)),
        }
    }
}

/// `None` when the host has hung up.
async fn read_frame(host: &Connection) -> io::Result<Option<Frame>> {
    let mut prefix = [0; FRAME_PREFIX_LEN];
    match host.read_exact(&mut prefix).await {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let mut wire = prefix.to_vec();
    wire.resize(FRAME_PREFIX_LEN + Frame::content_len(prefix), 0);
    host.read_exact(&mut wire[FRAME_PREFIX_LEN..]).await?;
    let invalid = |e| io::Error::new(io::ErrorKind::InvalidData, e);
    let frame = Frame::decode(&wire).map_err(invalid)?;
    Ok(frame.map(|(frame, _)| frame))
}

/// What the task waits for: errors are of datagrams that have been refused.
const NEWS: Interest = Interest::READABLE.add(Interest::ERROR);

struct Session {
    socket: Arc<AsyncFd<OwnedFd>>,
    /// Dropped with this value, which the task notices when it is not writing.
    _going_on: oneshot::Sender<()>,
}

struct Sessions {
    namespace: OwnedFd,
    open: HashMap<u32, Session>,
    /// Each hands the answers of one session to the host. Dropped with this value, which
    /// ends them.
    tasks: JoinSet<u32>,
}

impl Sessions {
    async fn begin(&mut self, session: u32, port: Port, answers: &Arc<Answers>) -> io::Result<()> {
        if self.open.len() >= MAX_SESSIONS || port.protocol != Protocol::Udp {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        if self.open.contains_key(&session) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let server = port.socket_address();
        let namespace = self.namespace.try_clone()?;
        let socket = in_namespace(namespace, move || connected(server)).await?;
        let socket = Arc::new(sys::on_runtime(socket.into(), NEWS)?);
        let (asked, answers) = (Arc::clone(&socket), Arc::clone(answers));
        let (going_on, ended) = oneshot::channel();
        self.tasks.spawn(async move {
            if let Err(e) = answers.take_from(session, &asked, ended).await {
                log::debug!("a client of {server}: {e}");
                // The host has hung up otherwise.
                let _ = answers.end(session).await;
            }
            session
        });
        let session_of_client = Session {
            socket,
            _going_on: going_on,
        };
        self.open.insert(session, session_of_client);
        Ok(())
    }

    /// As on any network: what there is no room for is lost. An error ends the session.
    fn pass_on(&mut self, session: u32, bytes: &[u8]) -> io::Result<()> {
        let Some(open) = self.open.get(&session) else {
            return Ok(());
        };
        let fd = open.socket.as_raw_fd();
        match send(fd, bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS) => Ok(()),
            Err(e) => {
                self.open.remove(&session);
                Err(e.into())
            }
        }
    }
}

/// A socket that asks a server. Without an address of its own it has the server's, as
/// clients on the same machine do.
fn connected(server: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = std::net::UdpSocket::bind(any)?;
    socket.connect(server)?;
    Ok(socket)
}

/// The way back to the host.
struct Answers {
    host: Connection,
    /// For one datagram; held while that is written.
    buffer: Mutex<Vec<u8>>,
}

impl Answers {
    /// Hands over what the server says until the host has ended the session.
    async fn take_from(
        &self,
        session: u32,
        socket: &AsyncFd<OwnedFd>,
        mut ended: oneshot::Receiver<()>,
    ) -> io::Result<()> {
        loop {
            let mut ready = tokio::select! {
                _ = &mut ended => return Ok(()),
                ready = socket.ready(NEWS) => ready?,
            };
            if !self.take_one(session, socket).await? {
                ready.clear_ready();
            }
        }
    }

    /// Whether there was one.
    async fn take_one(&self, session: u32, socket: &AsyncFd<OwnedFd>) -> io::Result<bool> {
        let mut buffer = self.buffer.lock().await;
        let len = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(len) => len,
            Err(Errno::EAGAIN) => return Ok(false),
            Err(Errno::EINTR) => return Ok(true),
            Err(e) => return Err(e.into()),
        };
        let said = Said::Datagram(buffer[..len].to_vec());
        self.write(&Frame { session, said }).await?;
        Ok(true)
    }

    async fn end(&self, session: u32) -> io::Result<()> {
        let _writing = self.buffer.lock().await;
        self.write(&Frame {
            session,
            said: Said::End,
        })
        .await
    }

    /// To be called with the buffer's lock.
    async fn write(&self, frame: &Frame) -> io::Result<()> {
        let bytes = frame.encode().map_err(io::Error::other)?;
        self.host.write_all(&bytes).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// What a host does with sessions in the namespace of the test.
    fn with_guest(host: impl FnOnce(&mut Host) + Send + 'static) {
        let (stream, ours) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let host = std::thread::spawn(move || {
            host(&mut Host {
                stream,
                read: Vec::new(),
            });
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let namespace = std::fs::File::open("/proc/self/ns/net").unwrap();
        runtime.block_on(async {
            let connection = Connection::new(ours.into()).unwrap();
            serve(connection, namespace.into()).await.unwrap();
        });
        host.join().unwrap();
    }

    struct Host {
        stream: UnixStream,
        read: Vec<u8>,
    }

    impl Host {
        fn say(&mut self, session: u32, said: Said) {
            let bytes = Frame { session, said }.encode().unwrap();
            self.stream.write_all(&bytes).unwrap();
        }

        fn hear(&mut self) -> (u32, Said) {
            loop {
                if let Some((frame, len)) = Frame::decode(&self.read).unwrap() {
                    self.read.drain(..len);
                    return (frame.session, frame.said);
                }
                let mut chunk = [0; 1024];
                let len = self.stream.read(&mut chunk).unwrap();
                assert_ne!(len, 0, "the guest has hung up");
                self.read.extend_from_slice(&chunk[..len]);
            }
        }
    }

    fn server() -> (std::net::UdpSocket, Port) {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let address = socket.local_addr().unwrap();
        let port = Port {
            protocol: Protocol::Udp,
            address: address.ip(),
            number: address.port(),
        };
        (socket, port)
    }

    fn datagram(bytes: &[u8]) -> Said {
        Said::Datagram(bytes.to_vec())
    }

    #[test]
    fn a_server_tells_clients_apart_and_answers_each() {
        with_guest(|host| {
            let (server, port) = server();
            let mut peers = Vec::new();
            for session in [1, 2] {
                host.say(session, Said::Open(port));
                host.say(session, datagram(&[session as u8; 5]));
                let mut buffer = [0; 10];
                let (len, peer) = server.recv_from(&mut buffer).unwrap();
                assert_eq!(buffer[..len], [session as u8; 5]);
                peers.push(peer);
            }
            assert_ne!(peers[0], peers[1]);
            // Without anything in it, too, and in the other order.
            server.send_to(b"", peers[1]).unwrap();
            assert_eq!(host.hear(), (2, datagram(b"")));
            server.send_to(b"one", peers[0]).unwrap();
            assert_eq!(host.hear(), (1, datagram(b"one")));
        });
    }

    #[test]
    fn a_session_ends_when_nobody_listens_any_more() {
        with_guest(|host| {
            let (server, port) = server();
            host.say(7, Said::Open(port));
            drop(server);
            // The first is refused, of which the socket tells.
            host.say(7, datagram(b"x"));
            assert_eq!(host.hear(), (7, Said::End));
            host.say(7, datagram(b"x"));
            host.say(8, Said::Open(port));
            host.say(8, datagram(b"x"));
            assert_eq!(host.hear(), (8, Said::End));
        });
    }

    #[test]
    fn an_end_frees_the_place_of_a_session() {
        with_guest(|host| {
            let (server, port) = server();
            let last = u32::try_from(MAX_SESSIONS).unwrap();
            for session in 1..=last {
                host.say(session, Said::Open(port));
            }
            host.say(last + 1, Said::Open(port));
            assert_eq!(host.hear(), (last + 1, Said::End));
            host.say(1, Said::End);
            host.say(last + 1, Said::Open(port));
            host.say(last + 1, datagram(b"hello"));
            let mut buffer = [0; 10];
            assert_eq!(server.recv(&mut buffer).unwrap(), 5);
        });
    }
}
