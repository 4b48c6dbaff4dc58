//! What a machine gets that was made of a template, before it goes on with its boot: random
//! numbers that no other has, and the time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use kuasar_runv_protocol::TEMPLATE_PORT;
use kuasar_runv_protocol::template::{Identity, SEED_LEN};

use super::{End, Sandboxer};
use crate::agent_client::vsock::{self, Dialing};
use crate::sandbox::VSOCK_SOCKET;
use crate::sys::random;
use crate::sys::unix_socket;

/// The socket device writes its answer at once.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);

/// The connection over which the guest gets it.
pub(super) enum Offer {
    /// Readable when the guest has accepted or refused.
    Made(Dialing),
    /// It is not closed before the guest is ready: it may not have read it.
    Accepted { _stream: UnixStream },
}

impl Offer {
    /// Says it to the guest of the sandbox directory, without waiting for it.
    ///
    /// # Errors
    /// There is no connection, or there are no random numbers.
    pub(super) fn make(dir: &Path) -> io::Result<Offer> {
        let dir = unix_socket::open_dir(dir)?;
        let mut dialing = vsock::start(dir.as_fd(), VSOCK_SOCKET, TEMPLATE_PORT)?;
        dialing.say(&identity()?.encode())?;
        Ok(Offer::Made(dialing))
    }

    /// What to wait for.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Offer::Made(dialing) => Some(dialing.as_fd()),
            Offer::Accepted { .. } => None,
        }
    }
}

fn identity() -> io::Result<Identity> {
    let mut seed = [0; SEED_LEN];
    random::fill(&mut seed)?;
    let now = std::time::UNIX_EPOCH.elapsed().map_err(io::Error::other)?;
    Ok(Identity {
        seed,
        realtime_ns: u64::try_from(now.as_nanos()).map_err(io::Error::other)?,
    })
}

impl Sandboxer {
    /// The guest has accepted it, or never will.
    pub(super) fn identity_is_answered(&mut self) -> Result<(), End> {
        let Some(Offer::Made(dialing)) = self.identity.take() else {
            return Ok(());
        };
        match dialing.finish(ANSWER_DEADLINE) {
            Ok(stream) => {
                self.identity = Some(Offer::Accepted { _stream: stream });
                Ok(())
            }
            Err(e) => Err(End::Failed(format!(
                "the machine of a template does not go on: {e}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_identity_is_another_and_of_now() {
        let (one, other) = (identity().unwrap(), identity().unwrap());
        assert_ne!(one.seed, other.seed);
        let now = std::time::UNIX_EPOCH.elapsed().unwrap();
        let told = Duration::from_nanos(one.realtime_ns);
        assert!(now - told < Duration::from_secs(60), "{told:?}");
    }
}
