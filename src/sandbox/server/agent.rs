//! The agent's event connection: that the guest is ready, and what happens in it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use kuasar_runv_protocol::agent::{Event, Ready};
use kuasar_runv_protocol::event::{MAX_EVENT_LEN, encode_from_host};
use kuasar_runv_protocol::resources::FromHost;
use kuasar_runv_protocol::{EVENT_PORT, PROTOCOL_VERSION};

use super::{Boot, End, Sandboxer, clock};
use crate::sandbox::VSOCK_SOCKET;
use crate::sandbox::control::{Notice, ReadyInfo, Reply, monotonic_us};

/// The agent's event connection, read without blocking and with a bound.
pub(super) struct AgentEvents {
    pub stream: UnixStream,
    buffer: Vec<u8>,
}

impl AgentEvents {
    pub(super) fn new(stream: UnixStream) -> AgentEvents {
        AgentEvents {
            stream,
            buffer: Vec::new(),
        }
    }

    /// What waits for its end to come.
    #[cfg(any(test, fuzzing))]
    pub(super) fn waiting(&self) -> usize {
        self.buffer.len()
    }

    /// The events that are complete.
    pub(super) fn receive(&mut self) -> io::Result<Vec<Event>> {
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(e) => return Err(e),
        }
        let mut events = Vec::new();
        while let Some(len) = self.buffer.first_chunk::<4>() {
            let len = u32::from_le_bytes(*len) as usize;
            if len > MAX_EVENT_LEN {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if self.buffer.len() < 4 + len {
                break;
            }
            let frame: Vec<u8> = self.buffer.drain(..4 + len).collect();
            events.extend(kuasar_runv_protocol::event::read_event(
                &mut frame.as_slice(),
            )?);
        }
        Ok(events)
    }
}

impl Sandboxer {
    pub(super) fn accept_agent(&mut self) {
        let Some(listener) = &self.event_listener else {
            return;
        };
        let accepted = listener.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        });
        match accepted {
            Ok(stream) => {
                self.agent = Some(AgentEvents::new(stream));
                // Containers can open vsock connections too: only the first one,
                // made before there is any, is the agent's.
                self.event_listener = None;
                let socket = self.dir.join(format!("{VSOCK_SOCKET}_{EVENT_PORT}"));
                if let Err(e) = std::fs::remove_file(&socket) {
                    log::warn!("removing {}: {e}", socket.display());
                }
            }
            Err(e) => log::warn!("the agent's connection: {e}"),
        }
    }

    pub(super) fn agent_events(&mut self) -> Result<(), End> {
        let Some(agent) = &mut self.agent else {
            return Ok(());
        };
        let events = match agent.receive() {
            Ok(events) => events,
            Err(e) => {
                log::info!("the agent's event connection: {e}");
                self.agent = None;
                return Ok(());
            }
        };
        for event in events {
            if event.has_ready() && matches!(self.boot, Boot::Running { .. }) {
                self.agent_is_ready(event.ready())?;
            } else if event.has_clock() {
                self.tell_agent(&clock::answer(event.clock()));
            } else if event.has_oom() {
                self.out_of_memory(event.oom());
            } else if event.has_exited() && event.exited().exec_id.is_empty() {
                let container = &event.exited().container_id;
                if !self.demands.has_others(container) {
                    self.network.container_ended(container);
                }
                self.notify(container, Notice::Ended);
            } else if event.has_exited() {
                log::debug!("trace-guest exec {}", event.exited().exec_us);
            }
        }
        Ok(())
    }

    /// Has the guest compare its clock.
    pub(super) fn clock_is_due(&mut self) {
        match self.clock.is_due() {
            Ok(true) => self.tell_agent(&clock::sync()),
            Ok(false) => {}
            Err(e) => log::warn!("watching the clock: {e}"),
        }
    }

    /// Sends a message the agent may or may not read: one that does not has no use
    /// for it, and is not waited for.
    pub(super) fn tell_agent(&self, message: &FromHost) {
        let Some(agent) = &self.agent else { return };
        let sent = encode_from_host(message).and_then(|bytes| {
            match (&agent.stream).write(&bytes)? {
                n if n == bytes.len() => Ok(()),
                // What follows would be misunderstood.
                _ => agent.stream.shutdown(std::net::Shutdown::Write),
            }
        });
        if let Err(e) = sent {
            log::debug!("telling the agent: {e}");
        }
    }

    fn agent_is_ready(&mut self, ready: &Ready) -> Result<(), End> {
        if ready.protocol_version != PROTOCOL_VERSION {
            return Err(End::Failed(format!(
                "the guest image speaks version {} of the protocol, this kuasar-runv {PROTOCOL_VERSION}: build the image anew",
                ready.protocol_version
            )));
        }
        self.forget_spare()
            .map_err(|e| End::Failed(e.to_string()))?;
        let info = ReadyInfo {
            sandboxer_start_us: self.start_us,
            vmm_start_us: self.vmm_start_us,
            agent_ready_us: monotonic_us(),
            guest_agent_start_us: ready.agent_start_us,
            guest_agent_ready_us: ready.agent_ready_us,
            kernel_release: ready.kernel_release.chars().take(64).collect(),
        };
        self.answer_waiting(&Reply {
            ready: Some(info.clone()),
            ..Reply::default()
        });
        self.identity = None;
        self.boot = Boot::Ready(info);
        Ok(())
    }
}
