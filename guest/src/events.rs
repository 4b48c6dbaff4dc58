//! The event connection: the agent tells the host that it is ready, which
//! processes have ended, and which containers ran out of memory; the host says
//! that clocks may differ, and when it has noted what it was told.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kuasar_runv_protocol::agent::{Event, Exited, Oom, Ready};
use kuasar_runv_protocol::event::{MAX_FROM_HOST_LEN, decode_from_host};
use kuasar_runv_protocol::resources::FromHost;
use kuasar_runv_protocol::{EVENT_PORT, PROTOCOL_VERSION, event};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use crate::clock::{Clock, Next};
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

/// How long the host may take to note that a container ran out of memory. It has
/// the engine told before the container's end is known.
const NOTE_DEADLINE: Duration = Duration::from_secs(10);

/// Sends events to the host.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<Event>,
    /// Who waits for the host to have noted it, by container.
    waiting: Arc<Mutex<HashMap<String, oneshot::Sender<()>>>>,
}

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
        let (queue, mut receiver) = mpsc::channel(QUEUE);
        let events = Events {
            queue,
            waiting: Arc::default(),
        };
        events.listen(connection.clone());
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
        Ok(events)
    }

    /// Takes what the host says, until it says no more.
    fn listen(&self, connection: Connection) {
        let (queue, waiting) = (self.queue.clone(), Arc::clone(&self.waiting));
        let clock = Clock::default();
        sys::spawn(async move {
            // The clock chip has told the time to the second.
            drop(queue.try_send(clock.begin()));
            loop {
                let message = match receive(&connection).await {
                    Ok(message) => message,
                    Err(e) => return log::info!("event connection: {e}"),
                };
                if message.has_sync_clock() {
                    drop(queue.try_send(clock.begin()));
                } else if message.has_clock() {
                    let corrected = match clock.answer(message.clock()) {
                        Next::Ask(question) => {
                            drop(queue.try_send(question));
                            Ok(())
                        }
                        Next::Shift(ns) => sys::shift_clock(ns),
                        Next::Slew(ns) => sys::slew_clock(ns / 1000),
                        Next::Nothing => Ok(()),
                    };
                    if let Err(e) = corrected {
                        log::warn!("setting the clock: {e}");
                    }
                } else if message.has_oom_noted() {
                    let id = &message.oom_noted().container_id;
                    // Nobody waits any more when it took too long.
                    let _ = lock(&waiting).remove(id).map(|waits| waits.send(()));
                }
            }
        });
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
        if self.queue.try_send(event).is_err() {
            log::error!("the end of {container_id} could not be reported");
        }
    }

    /// Reports that processes of a container were killed for lack of memory.
    pub fn oom(&self, container_id: &str, kills: u64) {
        self.send_oom(container_id, kills, false);
    }

    /// Reports that processes of a container, whose own has ended, were killed for lack
    /// of memory and waits until the host has noted it.
    pub async fn last_oom(&self, container_id: &str, kills: u64) {
        let (noted, waits) = oneshot::channel();
        drop(lock(&self.waiting).insert(container_id.to_owned(), noted));
        if self.send_oom(container_id, kills, true) && timeout(NOTE_DEADLINE, waits).await.is_err()
        {
            log::warn!("the host has not noted that {container_id} has no memory left");
        }
        drop(lock(&self.waiting).remove(container_id));
    }

    fn send_oom(&self, container_id: &str, kills: u64, awaited: bool) -> bool {
        let mut event = Event::new();
        event.set_oom(Oom {
            container_id: container_id.to_owned(),
            kills,
            awaited,
            ..Oom::new()
        });
        let sent = self.queue.try_send(event).is_ok();
        if !sent {
            log::error!("that {container_id} has no memory left could not be reported");
        }
        sent
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host's next message.
async fn receive(connection: &Connection) -> io::Result<FromHost> {
    let mut len = [0; 4];
    connection.read_exact(&mut len).await?;
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_FROM_HOST_LEN {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; len];
    connection.read_exact(&mut body).await?;
    decode_from_host(&body)
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
