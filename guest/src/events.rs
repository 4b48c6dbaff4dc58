//! The event connection: the agent tells the host that it is ready, which
//! processes have ended, and which containers ran out of memory.

use std::io;
use std::time::Duration;

use kuasar_runv_protocol::agent::{Event, Exited, Oom, Ready};
use kuasar_runv_protocol::{EVENT_PORT, PROTOCOL_VERSION, event};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::reaper::ExitStatus;
use crate::streams::Connection;
use crate::sys;
use crate::transport::Transport;

/// How long the host may take to listen.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
const CONNECT_RETRY: Duration = Duration::from_millis(50);
/// Events that wait for a host that does not read.
const QUEUE: usize = 1024;

pub const AGENT_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Sends events to the host.
#[derive(Clone)]
pub struct Events(mpsc::Sender<Event>);

impl Events {
    /// Connects to the host and says that the agent, which got control at
    /// `start_us`, is ready.
    ///
    /// # Errors
    /// When the host does not listen in time.
    pub async fn connect(transport: &Transport, start_us: u64) -> io::Result<Events> {
        let connection = Connection::new(connect(transport).await?)?;
        let mut ready = Event::new();
        ready.set_ready(Ready {
            protocol_version: PROTOCOL_VERSION,
            agent_version: AGENT_VERSION.to_owned(),
            kernel_release: kernel_release()?,
            agent_start_us: start_us,
            agent_ready_us: sys::boottime_us(),
            ..Ready::new()
        });
        connection.write_all(&event::encode(&ready)?).await?;
        let (sender, mut receiver) = mpsc::channel(QUEUE);
        sys::spawn(async move {
            while let Some(event) = receiver.recv().await {
                let sent = match event::encode(&event) {
                    Ok(bytes) => connection.write_all(&bytes).await,
                    Err(e) => Err(e),
                };
                if let Err(e) = sent {
                    // Containers and their stand-ins go on without.
                    log::error!("event connection: {e}");
                    return;
                }
            }
        });
        Ok(Events(sender))
    }

    /// Reports the end of a container's own process, or with an exec id of another,
    /// which took `exec_us` from its request to its end.
    pub fn exited(&self, container_id: &str, exec_id: &str, status: ExitStatus, exec_us: u64) {
        let (code, signal) = match status {
            ExitStatus::Exited(code) => (code, 0),
            ExitStatus::Killed(signal) => (0, signal),
        };
        let mut event = Event::new();
        event.set_exited(Exited {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            exec_us,
            code,
            signal,
            ..Exited::new()
        });
        if self.0.try_send(event).is_err() {
            log::error!("the end of {container_id} could not be reported");
        }
    }

    /// Reports that processes of a container were killed for lack of memory.
    pub fn oom(&self, container_id: &str, kills: u64) {
        let mut event = Event::new();
        event.set_oom(Oom {
            container_id: container_id.to_owned(),
            kills,
            ..Oom::new()
        });
        if self.0.try_send(event).is_err() {
            log::error!("that {container_id} has no memory left could not be reported");
        }
    }
}

async fn connect(transport: &Transport) -> io::Result<std::os::fd::OwnedFd> {
    let deadline = Instant::now() + CONNECT_DEADLINE;
    loop {
        match transport.connect(EVENT_PORT).await {
            Err(e) if Instant::now() < deadline => {
                log::debug!("connecting to the host: {e}");
                sleep(CONNECT_RETRY).await;
            }
            result => return result,
        }
    }
}

/// Release of the running kernel, as uname(2) has it.
///
/// # Errors
/// Of uname(2).
pub fn kernel_release() -> io::Result<String> {
    // SAFETY: plain data, for which zero is valid.
    let mut name: libc::utsname = unsafe { std::mem::zeroed() };
    // SAFETY: the struct is valid for the call.
    sys::check(unsafe { libc::uname(&raw mut name) }.into())?;
    // SAFETY: uname ends each field with a NUL.
    let release = unsafe { std::ffi::CStr::from_ptr(name.release.as_ptr()) };
    Ok(release.to_string_lossy().into_owned())
}
