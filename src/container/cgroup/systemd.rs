//! `--systemd-cgroup`: the container's cgroup is a transient scope of systemd.
//!
//! systemd makes the scope's cgroup when it gets its first process. That is a
//! placeholder: the sandboxer and the stand-in move in by themselves later (the scope
//! is delegated), and when they have gone, systemd removes it. The command talks to
//! the system's manager over the system bus, or systemd's private socket where there
//! is no bus, or to the user's over that one's bus.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use nix26::sys::socket::UnixAddr;
use rustbus::connection::Timeout;
use rustbus::connection::ll_conn::{DuplexConn, force_finish_on_error};
use rustbus::message_builder::{MarshalledMessage, MessageBuilder};
use rustbus::{MessageType, RpcConn};
use serde::{Deserialize, Serialize};

use super::limits::LEAST_SHARES;
use crate::container::Error;
use crate::container::limits::cpu_weight;
use crate::container::resources::Resources;

/// Says that systemd runs (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";
const PRIVATE: &str = "/run/systemd/private";
const NAME: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// How long systemd may take for an answer, and for making or ending a scope.
const DEADLINE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);
/// No limit, in the properties of limits.
const INFINITY: u64 = u64::MAX;

rustbus::dbus_variant_sig!(Value, Text => String; Texts => Vec<String>; Switch => bool; Number => u64; Pids => Vec<u32>);
type Property = (String, Value);

/// A scope to be: where it is and what it is called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    pub slice: String,
    pub unit: String,
}

impl Scope {
    /// Of `slice:prefix:name`, what engines give as `linux.cgroupsPath`.
    ///
    /// # Errors
    /// Another form, or no systemd.
    pub fn parse(path: Option<&Path>, id: &str) -> Result<Scope, Error> {
        if !Path::new(BOOTED).is_dir() {
            return Err(Error::Unsupported(
                "systemd not running on this host, cannot use systemd cgroups manager".into(),
            ));
        }
        let text = path.map(|path| path.to_string_lossy()).unwrap_or_default();
        Scope::of(&text, id)
    }

    fn of(text: &str, id: &str) -> Result<Scope, Error> {
        let (slice, prefix, name) = match text.split(':').collect::<Vec<_>>()[..] {
            // runc's defaults.
            [""] => ("", "runc", id),
            [slice, prefix, name] if !name.is_empty() => (slice, prefix, name),
            _ => {
                return Err(Error::Unsupported(format!(
                    "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got {text:?} instead"
                )));
            }
        };
        let slice = match (slice, nix::unistd::geteuid().is_root()) {
            ("", true) => "system.slice",
            ("", false) => "user.slice",
            (slice, _) => slice,
        };
        let plain = |part: &str| !part.contains('/') && !part.contains("..");
        if !slice.ends_with(".slice") || !plain(slice) || !plain(name) || !plain(prefix) {
            return Err(Error::Unsupported(format!(
                "invalid slice or scope name for systemd cgroups: {text:?}"
            )));
        }
        let unit = match prefix {
            "" => format!("{name}.scope"),
            prefix => format!("{prefix}-{name}.scope"),
        };
        Ok(Scope {
            slice: slice.to_owned(),
            unit,
        })
    }

    /// Its path in each hierarchy: `a-b.slice` lies in `a.slice` (systemd.slice(5)).
    #[must_use]
    pub fn path(&self) -> PathBuf {
        let mut path = PathBuf::from("/");
        let stem = self.slice.strip_suffix(".slice").unwrap_or(&self.slice);
        if stem != "-" {
            for (end, _) in stem.match_indices('-').chain([(stem.len(), "")]) {
                path.push(format!("{}.slice", &stem[..end]));
            }
        }
        path.join(&self.unit)
    }

    /// Has systemd make it. It stays as long as a process is in it: the value
    /// returned holds it until others are.
    ///
    /// # Errors
    /// [`Error::Systemd`].
    pub fn start(&self, id: &str, resources: &Resources) -> Result<Placeholder, Error> {
        let holder = Placeholder::spawn().map_err(self.failed("making its first process"))?;
        let mut systemd = Systemd::connect().map_err(self.failed("connecting to systemd"))?;
        let mut properties = vec![
            text("Description", format!("libcontainer container {id}")),
            text("Slice", self.slice.clone()),
            (
                "PIDs".to_owned(),
                Value::Pids(vec![holder.pid.as_raw().unsigned_abs()]),
            ),
        ];
        for accounting in ["CPU", "Memory", "Tasks", "IO"] {
            properties.push(switch(&format!("{accounting}Accounting"), true));
        }
        properties.push(switch("Delegate", true));
        properties.push(switch("DefaultDependencies", false));
        properties.extend(limits(resources));
        systemd
            .start_transient(&self.unit, properties)
            .map_err(self.failed("starting the scope"))?;
        let end = Instant::now() + DEADLINE;
        while !holder.is_in(&self.unit) {
            if Instant::now() >= end {
                let late = io::Error::from(io::ErrorKind::TimedOut);
                return Err(self.failed("waiting for the scope")(late));
            }
            std::thread::sleep(POLL);
        }
        Ok(holder)
    }

    /// Tells systemd the limits of the cgroup, which it would write over otherwise
    /// when it is reloaded.
    ///
    /// # Errors
    /// [`Error::Systemd`].
    pub fn set_limits(&self, resources: &Resources) -> Result<(), Error> {
        let properties = limits(resources);
        if properties.is_empty() {
            return Ok(());
        }
        Systemd::connect()
            .and_then(|mut systemd| systemd.set_properties(&self.unit, properties))
            .map_err(self.failed("setting limits"))
    }

    /// Ends it, if it has not ended by itself.
    ///
    /// # Errors
    /// [`Error::Systemd`].
    pub fn stop(&self) -> Result<(), Error> {
        Systemd::connect()
            .and_then(|mut systemd| systemd.stop(&self.unit))
            .map_err(self.failed("ending the scope"))
    }

    fn failed(&self, step: &'static str) -> impl Fn(io::Error) -> Error {
        let unit = self.unit.clone();
        move |source| Error::Systemd {
            unit: unit.clone(),
            step,
            source,
        }
    }
}

fn text(name: &str, value: String) -> Property {
    (name.to_owned(), Value::Text(value))
}

fn switch(name: &str, value: bool) -> Property {
    (name.to_owned(), Value::Switch(value))
}

/// The limits of processor time (systemd.resource-control(5)). Those of memory are
/// not systemd's to keep: they follow from the size of the virtual machine.
fn limits(resources: &Resources) -> Vec<Property> {
    let mut properties = Vec::new();
    if let Some(shares) = resources.cpu.shares.filter(|shares| *shares != 0) {
        let shares = shares.max(LEAST_SHARES);
        let (name, value) = match super::is_v2_only() {
            true => ("CPUWeight", cpu_weight(shares)),
            false => ("CPUShares", shares),
        };
        properties.push((name.to_owned(), Value::Number(value)));
    }
    if resources.cpu.quota.is_some_and(|quota| quota < 0) {
        let name = "CPUQuotaPerSecUSec".to_owned();
        properties.push((name, Value::Number(INFINITY)));
    }
    properties
}

/// A process that does nothing until the value is dropped.
#[derive(Debug)]
pub struct Placeholder {
    pid: Pid,
    _ends_when_closed: OwnedFd,
}

impl Placeholder {
    fn spawn() -> io::Result<Placeholder> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        // SAFETY: the child makes async-signal-safe calls only.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Placeholder {
                pid: child,
                _ends_when_closed: write,
            }),
            ForkResult::Child => {
                let mut byte = 0_u8;
                // SAFETY: system calls on plain integers and a live byte; the copy
                // of the writing end must not keep the pipe open.
                unsafe {
                    libc::close(write.as_raw_fd());
                    libc::read(read.as_raw_fd(), (&raw mut byte).cast(), 1);
                    libc::_exit(0)
                }
            }
        }
    }

    /// Whether a cgroup of this name has it, in whatever hierarchy systemd uses.
    fn is_in(&self, unit: &str) -> bool {
        let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", self.pid));
        let end = format!("/{unit}");
        cgroups.is_ok_and(|text| text.lines().any(|line| line.ends_with(&end)))
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        // Faster than the end of the pipe, which is for when this process is killed.
        let _ = nix::sys::signal::kill(self.pid, nix::sys::signal::Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// A connection to systemd's manager.
struct Systemd(RpcConn);

impl Systemd {
    fn connect() -> io::Result<Systemd> {
        if !nix::unistd::geteuid().is_root() {
            let connection = RpcConn::session_conn(Timeout::Duration(DEADLINE));
            return connection.map(Systemd).map_err(io::Error::other);
        }
        let bus = system_bus().and_then(|address| {
            RpcConn::connect_to_path(address, Timeout::Duration(DEADLINE)).map_err(io::Error::other)
        });
        match bus {
            Ok(connection) => Ok(Systemd(connection)),
            // Nobody to say hello to there.
            Err(e) => match UnixAddr::new(PRIVATE).map(|a| DuplexConn::connect_to_bus(a, false)) {
                Ok(Ok(connection)) => Ok(Systemd(RpcConn::new(connection))),
                _ => Err(e),
            },
        }
    }

    fn start_transient(&mut self, unit: &str, properties: Vec<Property>) -> io::Result<()> {
        let mut call = Self::message("StartTransientUnit");
        let auxiliary: &[(String, Vec<Property>)] = &[];
        call.body
            .push_param4(unit, "replace", properties, auxiliary)
            .map_err(io::Error::other)?;
        self.call(call).map(drop)
    }

    fn set_properties(&mut self, unit: &str, properties: Vec<Property>) -> io::Result<()> {
        let mut call = Self::message("SetUnitProperties");
        call.body
            .push_param3(unit, true, properties)
            .map_err(io::Error::other)?;
        self.call(call).map(drop)
    }

    fn stop(&mut self, unit: &str) -> io::Result<()> {
        let mut call = Self::message("StopUnit");
        call.body
            .push_param2(unit, "replace")
            .map_err(io::Error::other)?;
        match self.call(call) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map(drop),
        }
    }

    fn message(method: &str) -> MarshalledMessage {
        MessageBuilder::new()
            .call(method)
            .with_interface(MANAGER)
            .on(PATH)
            .at(NAME)
            .build()
    }

    /// `NotFound` when there is no such unit.
    fn call(&mut self, mut message: MarshalledMessage) -> io::Result<MarshalledMessage> {
        let deadline = Timeout::Duration(DEADLINE);
        let serial = self
            .0
            .send_message(&mut message)
            .map_err(io::Error::other)?
            .write(deadline)
            .map_err(force_finish_on_error)
            .map_err(io::Error::other)?;
        let answer = self
            .0
            .wait_response(serial, deadline)
            .map_err(io::Error::other)?;
        if !matches!(answer.typ, MessageType::Error) {
            return Ok(answer);
        }
        let name = answer.dynheader.error_name.clone().unwrap_or_default();
        let said = answer.body.parser().get::<String>().unwrap_or_default();
        Err(io::Error::new(kind_of(&name), format!("{said} ({name})")))
    }
}

/// What an error of that name is.
fn kind_of(name: &str) -> io::ErrorKind {
    match name {
        "org.freedesktop.systemd1.NoSuchUnit" => io::ErrorKind::NotFound,
        _ => io::ErrorKind::Other,
    }
}

/// `DBUS_SYSTEM_BUS_ADDRESS`, or where the bus is by convention.
fn system_bus() -> io::Result<UnixAddr> {
    let address = std::env::var("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or_default();
    let path = address
        .strip_prefix("unix:path=")
        .map_or(SYSTEM_BUS, |rest| {
            rest.split([',', ';']).next().unwrap_or(rest)
        });
    UnixAddr::new(path).map_err(|e| io::Error::from_raw_os_error(e as i32))
}

#[cfg(test)]
mod tests;
