//! A socket of the host: a listening socket of the guest whose connections go on to
//! the host.

use std::fs::{self, Permissions};
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kuasar_runv_protocol::SOCKET_PORT;
use kuasar_runv_protocol::socket::{Hello, Token};
use kuasar_runv_protocol::storage;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::{Error, Result, make_place};
use crate::streams::Connection;
use crate::sys;
use crate::transport::Transport;

const FILE: &str = "socket";
/// Most connections through one socket at the same time; others wait to be accepted.
const MAX_CONNECTIONS: usize = 64;
/// What is on its way in each direction, in bytes.
const BUFFER: usize = 64 * 1024;

/// The listening socket. Removed with [`remove`](Socket::remove).
pub struct Socket {
    place: PathBuf,
    path: PathBuf,
    accepting: JoinHandle<()>,
}

impl Socket {
    /// Listens, with the owner and the mode that are asked for.
    ///
    /// # Errors
    /// `Invalid` for a token that is none; of the socket calls.
    pub fn listen(name: &str, wanted: &storage::Socket, transport: &Transport) -> Result<Socket> {
        let token = Token::try_from(wanted.token.as_slice())
            .map_err(|_| Error::Invalid("the token of a socket has another length".into()))?;
        let place = make_place(name)?;
        let path = place.join(FILE);
        let listener = UnixListener::bind(&path)
            .and_then(|listener| {
                chown(&path, Some(wanted.uid), Some(wanted.gid))?;
                fs::set_permissions(&path, Permissions::from_mode(wanted.mode & 0o7777))?;
                Ok(listener)
            })
            .map_err(Error::io(format!("listening on {}", path.display())))?;
        let accepting = tokio::spawn(accept(listener, token, transport.clone()));
        Ok(Socket {
            place,
            path,
            accepting,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes no more connections; those that are end by themselves.
    ///
    /// # Errors
    /// Of unlink(2) and rmdir(2).
    pub fn remove(&mut self) -> Result<()> {
        self.accepting.abort();
        fs::remove_file(&self.path)
            .and_then(|()| fs::remove_dir(&self.place))
            .map_err(Error::io(format!("removing {}", self.path.display())))
    }
}

async fn accept(listener: UnixListener, token: Token, transport: Transport) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(e) => {
                // EMFILE: some will end.
                log::warn!("a socket of the host: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let transport = transport.clone();
        sys::spawn(async move {
            if let Err(e) = serve(client, token, &transport).await {
                log::info!("a socket of the host: {e}");
            }
            drop(place);
        });
    }
}

async fn serve(client: UnixStream, token: Token, transport: &Transport) -> io::Result<()> {
    let who = client.peer_cred()?;
    let hello = Hello {
        token,
        uid: who.uid(),
        gid: who.gid(),
    };
    let host = Connection::new(transport.connect(SOCKET_PORT).await?)?;
    host.write_all(&hello.encode()).await?;
    let client = Connection::new(OwnedFd::from(client.into_std()?))?;
    relay(&client, &host).await
}

/// Moves bytes both ways until the client is gone, or both have ended, which is a hang-up too.
async fn relay(client: &Connection, host: &Connection) -> io::Result<()> {
    let forth = async {
        pump(client, host).await;
        client.hung_up().await
    };
    let back = async {
        pump(host, client).await;
        std::future::pending().await
    };
    tokio::select! {
        ended = forth => ended,
        ended = back => ended,
    }
}

/// Moves bytes until there are no more, or nobody wants them any more.
async fn pump(from: &Connection, to: &Connection) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        if to.write_all(&buffer[..len]).await.is_err() {
            from.shutdown(Shutdown::Read);
            break;
        }
    }
    to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream as StdStream;

    use super::*;

    fn pair() -> (Connection, StdStream) {
        let (ours, theirs) = StdStream::pair().unwrap();
        (Connection::new(ours.into()).unwrap(), theirs)
    }

    /// One direction ends before the other, and one that nobody reads is given up.
    #[tokio::test]
    async fn each_direction_has_an_end_of_its_own() {
        let ((client, outer), (host, inner)) = (pair(), pair());
        let relayed = tokio::spawn(async move { relay(&client, &host).await });
        let talk = tokio::task::spawn_blocking(move || {
            use std::io::{Read, Write};
            let (mut outer, mut inner) = (outer, inner);
            let mut text = String::new();
            outer.write_all(b"question").unwrap();
            outer.shutdown(Shutdown::Write).unwrap();
            inner.read_to_string(&mut text).unwrap();
            assert_eq!(text, "question");
            inner.write_all(b"answer").unwrap();
            drop(inner);
            text.clear();
            outer.read_to_string(&mut text).unwrap();
            assert_eq!(text, "answer");
        });
        talk.await.unwrap();
        relayed.await.unwrap().unwrap();
    }

    /// A service that never closes keeps nothing once its client is gone.
    #[tokio::test]
    async fn it_ends_with_the_client() {
        let ((client, outer), (host, inner)) = (pair(), pair());
        drop(outer);
        let relayed = tokio::time::timeout(Duration::from_secs(10), relay(&client, &host)).await;
        relayed.unwrap().unwrap();
        drop(inner);
    }
}
