//! Datagrams to the UDP ports that the guest listens on, and the answers.
//!
//! Each client of a port is a session: what it sends goes to a socket of its own in the
//! guest, and what is answered there comes back from the address it has asked. One
//! connection to the guest carries them all. Sessions end after a time without datagrams;
//! when there are too many, the one that has been silent for longest makes room. What the
//! guest is too slow to take is lost, as on any network.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kuasar_runv_protocol::loopback::{Frame, MAX_SESSIONS, Port, Protocol, Purpose, Request, Said};

use super::Way;
use super::packet::{self, Ends};

/// How long a client may be silent, and its server: what firewalls give a stream of
/// datagrams.
const IDLE: Duration = Duration::from_secs(120);
/// Most bytes that wait for the guest to take them.
const MAX_OUTGOING: usize = 256 * 1024;
/// After a connection to the guest that failed.
const RETRY: Duration = Duration::from_secs(1);
/// Most datagrams of a port at once, so that others have their turn.
const BURST: usize = 32;
/// Bytes that are read of the guest at once.
const CHUNK: usize = 64 * 1024;
/// Room for a datagram of any length.
const MAX_DATAGRAM: usize = 65_536;

/// All UDP ports of a container.
pub struct Datagrams {
    /// What the guest listens on, and what still has sessions: a server may answer by
    /// another socket than the one that it listens with, and close that. If there is none
    /// any more, the guest says so when something is sent to it.
    sockets: BTreeMap<Port, OwnedFd>,
    wanted: BTreeSet<Port>,
    sessions: Sessions,
    guest: Option<Channel>,
    /// When the guest may be connected to again.
    next: Instant,
    buffer: Vec<u8>,
}

impl Datagrams {
    pub fn new() -> Datagrams {
        Datagrams {
            sockets: BTreeMap::new(),
            wanted: BTreeSet::new(),
            sessions: Sessions::default(),
            guest: None,
            next: Instant::now(),
            buffer: Vec::new(),
        }
    }

    /// Listens on those of these ports that are UDP's, and no others.
    pub fn follow(&mut self, ports: &BTreeSet<Port>) {
        let is_udp = |port: &&Port| port.protocol == Protocol::Udp;
        self.wanted = ports.iter().filter(is_udp).copied().collect();
        self.close_unused();
        for port in &self.wanted {
            if self.sockets.contains_key(port) {
                continue;
            }
            match packet::bind(*port) {
                Ok(socket) => drop(self.sockets.insert(*port, socket)),
                // Somebody on the host has it, or there is no IPv6.
                Err(e) => log::debug!("datagrams for {}: {e}", port.socket_address()),
            }
        }
        if !self.sockets.is_empty() && self.buffer.is_empty() {
            self.buffer = vec![0; MAX_DATAGRAM];
        }
    }

    fn close_unused(&mut self) {
        let (wanted, sessions) = (&self.wanted, &self.sessions);
        self.sockets
            .retain(|port, _| wanted.contains(port) || sessions.has(*port));
    }

    pub fn ports(&self) -> impl Iterator<Item = (Port, BorrowedFd<'_>)> {
        self.sockets.iter().map(|(port, fd)| (*port, fd.as_fd()))
    }

    /// The connection to the guest, and whether something waits to be written.
    pub fn guest(&self) -> Option<(BorrowedFd<'_>, bool)> {
        let channel = self.guest.as_ref()?;
        Some((channel.stream.as_fd(), !channel.outgoing.is_empty()))
    }

    /// When [`expire`](Self::expire) has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        let idle = self.sessions.all.values().map(|session| session.used);
        idle.min().map(|used| used + IDLE)
    }

    /// Ends the sessions that have been silent for too long.
    pub fn expire(&mut self, now: Instant) {
        let ended = self.sessions.retain(|_, session| now - session.used < IDLE);
        if !ended.is_empty() {
            self.close_unused();
            self.say(ended.into_iter().map(|session| (session, Said::End)));
        }
    }

    /// Takes what clients have sent to this port.
    pub fn receive(&mut self, port: Port, way: &Way) {
        for _ in 0..BURST {
            let Some(socket) = self.sockets.get(&port) else {
                return;
            };
            match packet::receive(socket, port, &mut self.buffer) {
                Ok((len, ends)) => self.pass_on(len, ends, way),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // Of a datagram that was sent before.
                Err(e) => log::debug!("datagrams for {}: {e}", port.socket_address()),
            }
        }
    }

    fn pass_on(&mut self, len: usize, ends: Ends, way: &Way) {
        let now = Instant::now();
        if self.guest.is_none() {
            if now < self.next {
                return;
            }
            match connect(way) {
                Ok(channel) => self.guest = Some(channel),
                Err(e) => {
                    self.next = Instant::now() + RETRY;
                    log::debug!("datagrams of {}: {e}", way.container);
                    return;
                }
            }
        }
        let Some(guest) = &mut self.guest else { return };
        if guest.outgoing.len() + len > MAX_OUTGOING {
            return;
        }
        let mut frames = Vec::new();
        let number = match self.sessions.find(&ends, now) {
            Some(number) => number,
            None => {
                let (number, replaced) = self.sessions.begin(ends, now);
                frames.extend(replaced.map(|session| (session, Said::End)));
                frames.push((number, Said::Open(ends.asked())));
                number
            }
        };
        frames.push((number, Said::Datagram(self.buffer[..len].to_vec())));
        self.say(frames);
    }

    fn say(&mut self, frames: impl IntoIterator<Item = (u32, Said)>) {
        let Some(guest) = &mut self.guest else { return };
        let said = guest
            .say(
                frames
                    .into_iter()
                    .map(|(session, said)| Frame { session, said }),
            )
            .and_then(|()| guest.write());
        if let Err(e) = said {
            self.hang_up(&e);
        }
    }

    /// Reads what the guest says, and writes what it takes.
    pub fn go_on(&mut self) {
        if let Err(e) = self.exchange() {
            self.hang_up(&e);
        }
    }

    fn exchange(&mut self) -> io::Result<()> {
        let Some(guest) = &mut self.guest else {
            return Ok(());
        };
        guest.write()?;
        for Frame { session, said } in guest.read()? {
            match said {
                Said::Datagram(bytes) => {
                    if let Some((ends, session)) = self.sessions.get(session)
                        && let Some(socket) = self.sockets.get(&ends.port)
                    {
                        session.used = Instant::now();
                        if let Err(e) = packet::send(socket, &bytes, &ends) {
                            log::debug!("an answer to {}: {e}", ends.client);
                        }
                    }
                }
                Said::End => {
                    self.sessions.forget(session);
                    self.close_unused();
                }
                Said::Open(_) => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
        Ok(())
    }

    fn hang_up(&mut self, e: &io::Error) {
        log::debug!("datagrams: {e}");
        self.guest = None;
        self.sessions = Sessions::default();
        self.close_unused();
        self.next = Instant::now() + RETRY;
    }
}

fn connect(way: &Way) -> io::Result<Channel> {
    let stream = way.guest()?.loopback(&Request {
        purpose: Purpose::Datagrams,
        container_id: way.container.clone(),
    })?;
    Channel::new(stream)
}

struct Session {
    number: u32,
    used: Instant,
}

#[derive(Default)]
struct Sessions {
    last: u32,
    all: HashMap<Ends, Session>,
    by_number: HashMap<u32, Ends>,
}

impl Sessions {
    /// The session that a datagram belongs to.
    fn find(&mut self, ends: &Ends, now: Instant) -> Option<u32> {
        let session = self.all.get_mut(ends)?;
        session.used = now;
        Some(session.number)
    }

    /// A new session, and the one that had to make room for it.
    fn begin(&mut self, ends: Ends, now: Instant) -> (u32, Option<u32>) {
        let mut replaced = None;
        if self.all.len() >= MAX_SESSIONS {
            let oldest = self.all.values().min_by_key(|session| session.used);
            replaced = oldest.map(|session| session.number);
            replaced.into_iter().for_each(|number| self.forget(number));
        }
        self.last = self.last.wrapping_add(1);
        let number = self.last;
        self.by_number.insert(number, ends);
        self.all.insert(ends, Session { number, used: now });
        (number, replaced)
    }

    fn get(&mut self, number: u32) -> Option<(Ends, &mut Session)> {
        let ends = *self.by_number.get(&number)?;
        Some((ends, self.all.get_mut(&ends)?))
    }

    fn forget(&mut self, number: u32) {
        if let Some(ends) = self.by_number.remove(&number) {
            self.all.remove(&ends);
        }
    }

    fn has(&self, port: Port) -> bool {
        self.all.keys().any(|ends| ends.port == port)
    }

    /// Keeps these; the numbers of the others.
    fn retain(&mut self, keep: impl Fn(&Ends, &Session) -> bool) -> Vec<u32> {
        let others = self
            .all
            .iter()
            .filter(|(ends, session)| !keep(ends, session));
        let others: Vec<u32> = others.map(|(_, session)| session.number).collect();
        others.iter().for_each(|number| self.forget(*number));
        others
    }
}

/// The connection to the guest, of which neither end waits for the other.
struct Channel {
    stream: UnixStream,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

impl Channel {
    fn new(stream: UnixStream) -> io::Result<Channel> {
        stream.set_nonblocking(true)?;
        Ok(Channel {
            stream,
            outgoing: Vec::new(),
            incoming: Vec::new(),
        })
    }

    /// To be written. Fails when the guest has taken nothing for so long that even the
    /// ends of sessions, which it has to be told of, have no room.
    fn say(&mut self, frames: impl Iterator<Item = Frame>) -> io::Result<()> {
        for frame in frames {
            let bytes = frame.encode().map_err(io::Error::other)?;
            self.outgoing.extend_from_slice(&bytes);
        }
        if self.outgoing.len() > 2 * MAX_OUTGOING {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(len) => drop(self.outgoing.drain(..len)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Frames that are complete; no more than one frame's bytes are kept.
    fn read(&mut self) -> io::Result<Vec<Frame>> {
        let kept = self.incoming.len();
        self.incoming.resize(kept + CHUNK, 0);
        let read = self.stream.read(&mut self.incoming[kept..]);
        self.incoming.truncate(kept + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        let mut frames = Vec::new();
        let mut at = 0;
        let invalid = |e| io::Error::new(io::ErrorKind::InvalidData, e);
        while let Some((frame, len)) = Frame::decode(&self.incoming[at..]).map_err(invalid)? {
            frames.push(frame);
            at += len;
        }
        self.incoming.drain(..at);
        Ok(frames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root::Root;
    use std::net::UdpSocket;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// A port of this machine, whose guest is the test.
    struct Fixture {
        datagrams: Datagrams,
        port: Port,
        guest: UnixStream,
        way: Way,
    }

    impl Fixture {
        fn new() -> Fixture {
            let free = UdpSocket::bind("127.0.0.1:0").unwrap();
            let address = free.local_addr().unwrap();
            drop(free);
            let port = Port {
                protocol: Protocol::Udp,
                address: address.ip(),
                number: address.port(),
            };
            let (guest, ours) = UnixStream::pair().unwrap();
            guest.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut datagrams = Datagrams::new();
            datagrams.guest = Some(Channel::new(ours).unwrap());
            datagrams.follow(&[port].into());
            let way = Way {
                root: Root::new(Some("/nonexistent".into())),
                sandbox_id: "s".into(),
                container: "c".into(),
            };
            Fixture {
                datagrams,
                port,
                guest,
                way,
            }
        }

        fn client(&self) -> UdpSocket {
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            client.set_read_timeout(Some(DEADLINE)).unwrap();
            client.connect(self.port.socket_address()).unwrap();
            client
        }

        /// What the guest hears of it.
        fn ask(&mut self, client: &UdpSocket, question: &[u8], frames: usize) -> Vec<(u32, Said)> {
            client.send(question).unwrap();
            self.datagrams.receive(self.port, &self.way);
            self.hear(frames)
        }

        fn hear(&mut self, frames: usize) -> Vec<(u32, Said)> {
            let heard = (0..frames).map(|_| {
                let mut wire = vec![0; 7];
                self.guest.read_exact(&mut wire).unwrap();
                let len = Frame::content_len(wire[..].try_into().unwrap());
                wire.resize(7 + len, 0);
                self.guest.read_exact(&mut wire[7..]).unwrap();
                let (frame, _) = Frame::decode(&wire).unwrap().unwrap();
                (frame.session, frame.said)
            });
            heard.collect()
        }

        fn answer(&mut self, session: u32, said: Said) {
            let bytes = Frame { session, said }.encode().unwrap();
            self.guest.write_all(&bytes).unwrap();
            self.datagrams.go_on();
        }
    }

    fn datagram(bytes: &[u8]) -> Said {
        Said::Datagram(bytes.to_vec())
    }

    #[test]
    fn each_client_has_a_session_and_its_answers() {
        let mut fixture = Fixture::new();
        let clients = [fixture.client(), fixture.client()];
        for (session, client) in (1..).zip(&clients) {
            let heard = fixture.ask(client, b"question", 2);
            let open = (session, Said::Open(fixture.port));
            assert_eq!(heard, [open, (session, datagram(b"question"))]);
        }
        let heard = fixture.ask(&clients[0], b"", 1);
        assert_eq!(heard, [(1, datagram(b""))]);
        for (session, client) in [(2, &clients[1]), (1, &clients[0])] {
            fixture.answer(session, datagram(&[session as u8]));
            let mut buffer = [0; 5];
            let len = client.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..len], [session as u8]);
        }
        // To nobody.
        fixture.answer(9, datagram(b"x"));
        // The guest knows it no more: the client begins anew.
        fixture.answer(1, Said::End);
        let heard = fixture.ask(&clients[0], b"again", 2);
        assert_eq!(heard[0], (3, Said::Open(fixture.port)));
    }

    #[test]
    fn sessions_end_when_they_are_silent_or_the_guest_says_so() {
        let mut fixture = Fixture::new();
        let client = fixture.client();
        assert_eq!(fixture.datagrams.deadline(), None);
        fixture.ask(&client, b"x", 2);
        let deadline = fixture.datagrams.deadline().unwrap();
        fixture
            .datagrams
            .expire(deadline - Duration::from_millis(1));
        assert!(fixture.datagrams.deadline().is_some());
        fixture.datagrams.expire(deadline);
        assert_eq!(fixture.datagrams.deadline(), None);
        assert_eq!(fixture.hear(1), [(1, Said::End)]);
        // Its server may have another socket.
        fixture.ask(&client, b"x", 2);
        fixture.datagrams.follow(&BTreeSet::new());
        let heard = fixture.ask(&client, b"y", 1);
        assert_eq!(heard, [(2, datagram(b"y"))]);
        fixture.answer(2, Said::End);
        assert_eq!(fixture.datagrams.ports().count(), 0);
        let _ = client.send(b"x");
        let refused = client.recv(&mut [0]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn who_has_been_silent_for_longest_makes_room() {
        let mut fixture = Fixture::new();
        let clients: Vec<_> = (0..MAX_SESSIONS).map(|_| fixture.client()).collect();
        for client in &clients {
            fixture.ask(client, b"x", 2);
        }
        // The second has been silent for longest then.
        fixture.ask(&clients[0], b"x", 1);
        let newest = fixture.client();
        let heard = fixture.ask(&newest, b"x", 3);
        assert_eq!(heard[0], (2, Said::End));
        assert_eq!(fixture.datagrams.sessions.all.len(), MAX_SESSIONS);
        assert_eq!(fixture.datagrams.sessions.by_number.len(), MAX_SESSIONS);
    }

    #[test]
    fn a_guest_that_takes_nothing_costs_a_bounded_amount() {
        let mut fixture = Fixture::new();
        let client = fixture.client();
        for _ in 0..200 {
            client.send(&[7; 30_000]).unwrap();
            fixture.datagrams.receive(fixture.port, &fixture.way);
        }
        let (_, waits) = fixture.datagrams.guest().unwrap();
        assert!(waits);
        let outgoing = &fixture.datagrams.guest.as_ref().unwrap().outgoing;
        assert!(
            outgoing.len() <= MAX_OUTGOING + 2 * 7 + 20,
            "{}",
            outgoing.len()
        );
        // What it took is whole.
        let heard = fixture.hear(2);
        assert_eq!(heard[1], (1, datagram(&[7; 30_000])));
    }

    #[test]
    fn a_guest_that_makes_no_sense_or_hangs_up_is_not_heard_any_more() {
        let port = Fixture::new().port;
        for said in [Some(Said::Open(port)), None] {
            let mut fixture = Fixture::new();
            let client = fixture.client();
            fixture.ask(&client, b"x", 2);
            match said {
                Some(said) => fixture.answer(1, said),
                None => fixture.guest.shutdown(std::net::Shutdown::Both).unwrap(),
            }
            fixture.datagrams.go_on();
            assert!(fixture.datagrams.guest().is_none());
            assert_eq!(fixture.datagrams.deadline(), None);
            // Not at once, and there is no guest.
            client.send(b"x").unwrap();
            fixture.datagrams.receive(fixture.port, &fixture.way);
            assert!(fixture.datagrams.guest().is_none());
        }
    }
}
