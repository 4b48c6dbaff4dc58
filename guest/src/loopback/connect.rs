//! Connections of the host to a port of a container.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use kuasar_runv_protocol::loopback::{Answer, Port};

use super::{answer, in_namespace};
use crate::streams::Connection;

/// How long the server may take to accept.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
const BUFFER: usize = 32 * 1024;

/// Connects, says whether that succeeded, and moves bytes until both sides have ended.
///
/// # Errors
/// Of the connections.
pub async fn serve(host: Connection, namespace: OwnedFd, port: Port) -> io::Result<()> {
    let connected = in_namespace(namespace, move || {
        let stream = TcpStream::connect_timeout(&port.socket_address(), CONNECT_DEADLINE)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    });
    let server = match connected.await {
        Ok(stream) => Connection::new(stream.into())?,
        Err(e) => {
            let reason = match e.kind() {
                io::ErrorKind::ConnectionRefused => Answer::Refused,
                _ => Answer::Failed,
            };
            return answer(&host, reason).await;
        }
    };
    answer(&host, Answer::Yes).await?;
    relay(&host, &server).await
}

/// Moves bytes both ways. The end of one way travels on; a failure ends both.
async fn relay(a: &Connection, b: &Connection) -> io::Result<()> {
    let moved = tokio::try_join!(pump(a, b), pump(b, a)).map(drop);
    if moved.is_err() {
        a.shutdown(Shutdown::Both);
        b.shutdown(Shutdown::Both);
    }
    moved
}

async fn pump(from: &Connection, to: &Connection) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await? {
            0 => {
                to.shutdown(Shutdown::Write);
                return Ok(());
            }
            n => to.write_all(&buffer[..n]).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_and_ends_travel_both_ways() {
        let (mut client, a) = UnixStream::pair().unwrap();
        let (mut server, b) = UnixStream::pair().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let ends = std::thread::spawn(move || {
            let mut question = Vec::new();
            client.write_all(b"question").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            server.read_to_end(&mut question).unwrap();
            // More than any buffer holds, after the other way has ended.
            let writer = std::thread::spawn(move || server.write_all(&vec![1; 1 << 20]).unwrap());
            let mut reply = Vec::new();
            client.read_to_end(&mut reply).unwrap();
            writer.join().unwrap();
            (question, reply.len())
        });
        runtime.block_on(async {
            let a = Connection::new(a.into()).unwrap();
            let b = Connection::new(b.into()).unwrap();
            relay(&a, &b).await.unwrap();
        });
        assert_eq!(ends.join().unwrap(), (b"question".to_vec(), 1 << 20));
    }
}
