//! From what QEMU's monitor says to what happened to the machine.

use std::collections::VecDeque;

use super::hotplug::HotPlug;
use super::qmp::{Message, Qmp, QmpError};
use crate::vm::VmEvent;

/// Draws the consequences of what QEMU says.
pub(super) fn on_message(
    message: Message,
    qmp: &mut Qmp,
    status_query: &mut Option<u64>,
    hotplug: &mut HotPlug,
    events: &mut VecDeque<VmEvent>,
) -> Result<(), QmpError> {
    match message {
        Message::Greeting => {}
        Message::Event { name, data } => match name.as_str() {
            "SHUTDOWN" => events.push_back(match data["reason"].as_str() {
                Some("guest-reset" | "subsystem-reset") => VmEvent::GuestReset,
                Some("guest-panic") => VmEvent::GuestPanicked,
                Some("guest-shutdown") => VmEvent::GuestShutdown,
                // Signals and errors of the host's side: `Exited` follows.
                _ => return Ok(()),
            }),
            "GUEST_PANICKED" => events.push_back(VmEvent::GuestPanicked),
            // Our own pause, or the end: an internal error of KVM has no event
            // of its own.
            "STOP" => *status_query = Some(qmp.send("query-status", None)?),
            // Parts of a device have events of their own, without an id.
            "DEVICE_DELETED" => {
                if let Some(id) = data["device"].as_str() {
                    events.extend(hotplug.on_deleted(qmp, id)?);
                }
            }
            _ => {}
        },
        Message::Answer { id, result } if Some(id) == *status_query => {
            *status_query = None;
            let status = result.unwrap_or_default();
            // RunState of QEMU's qapi/run-state.json.
            if let Some(reason @ ("internal-error" | "io-error" | "watchdog")) =
                status["status"].as_str()
            {
                events.push_back(VmEvent::Stalled {
                    reason: format!("QEMU reports {reason}"),
                });
            }
        }
        Message::Answer { id, result } => {
            if let Err(description) = result {
                log::warn!("QEMU refused request {id}: {description}");
            }
        }
    }
    Ok(())
}
