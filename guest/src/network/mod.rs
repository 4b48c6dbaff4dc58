//! The networks of containers: the service of `network.proto`.
//!
//! What the host asks for is compared with what it asked for before, so that only
//! what has changed is touched, and what a container has set up itself stays. The
//! work is done by a thread that goes to the container's network namespace and ends
//! there ([`apply`]). Before the first program of the machine runs, the agent does it
//! itself: making a thread and ending it is a tenth of the work under emulation.

mod apply;
mod links;
mod settings;
mod stats;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use kuasar_runv_protocol::network::{
    ApplyRequest, ApplyResponse, Interface, StatsRequest, StatsResponse,
};
use kuasar_runv_protocol::network_ttrpc::Network;
use nix::sched::{CloneFlags, setns};
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, Error, get_status};

use crate::containers::{ContainerError, Containers};

/// Longest name of an interface, in bytes (`IFNAMSIZ` without the final NUL).
const MAX_NAME: usize = 15;
/// Most interfaces of a container.
const MAX_INTERFACES: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error("not a valid request: {0}")]
    Invalid(String),
    #[error("the device of {0} did not appear")]
    NoDevice(String),
    #[error("{context}: {source}")]
    Io { context: String, source: io::Error },
}

impl NetworkError {
    fn io<E: Into<io::Error>>(context: impl Into<String>) -> impl FnOnce(E) -> NetworkError {
        let context = context.into();
        move |source| NetworkError::Io {
            context,
            source: source.into(),
        }
    }

    fn code(&self) -> Code {
        match self {
            NetworkError::Container(ContainerError::NotFound) => Code::NOT_FOUND,
            NetworkError::Container(_) => Code::FAILED_PRECONDITION,
            NetworkError::Invalid(_) => Code::INVALID_ARGUMENT,
            NetworkError::NoDevice(_) => Code::DEADLINE_EXCEEDED,
            NetworkError::Io { .. } => Code::INTERNAL,
        }
    }
}

type Result<T> = std::result::Result<T, NetworkError>;

/// What a container's network is, as far as the host has made it.
#[derive(Debug, Default)]
struct Applied {
    request: ApplyRequest,
    /// Indices of the interfaces in the guest, by the hardware address of the device.
    indices: HashMap<Vec<u8>, u32>,
}

/// The service of `network.proto`.
pub struct NetworkService {
    containers: Arc<Containers>,
    applied: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Applied>>>>,
}

impl NetworkService {
    #[must_use]
    pub fn new(containers: Arc<Containers>) -> NetworkService {
        NetworkService {
            containers,
            applied: Mutex::default(),
        }
    }

    async fn make_so(&self, mut request: ApplyRequest) -> Result<()> {
        check(&request)?;
        let id = request.container_id.clone();
        let namespace = self.containers.network_namespace(&id);
        let is_end = request.interfaces.is_empty() && request.addresses.is_empty();
        let applied = {
            let mut all = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(inherited) = all.remove(&request.heir_of) {
                all.insert(id.clone(), inherited);
            }
            match is_end {
                true => all.remove(&id).unwrap_or_default(),
                false => Arc::clone(all.entry(id).or_default()),
            }
        };
        // Only this time.
        request.heir_of.clear();
        let mut applied = applied.lock_owned().await;
        match namespace {
            Ok(namespace) if self.containers.none_started() => {
                in_place(|| apply::apply(namespace, &mut applied, request))
            }
            Ok(namespace) => {
                in_thread(move || apply::apply(namespace, &mut applied, request)).await
            }
            // The kernel has returned its interfaces to the machine.
            Err(_) if is_end => in_thread(move || apply::let_go(&applied)).await,
            Err(e) => Err(e.into()),
        }
    }
}

/// Runs the work on this thread, which is in the machine's network namespace again
/// when it is done.
fn in_place(work: impl FnOnce() -> Result<()>) -> Result<()> {
    let machine = File::open("/proc/thread-self/ns/net")
        .map_err(NetworkError::io("opening the machine's network namespace"))?;
    let result = work();
    if let Err(e) = setns(&machine, CloneFlags::CLONE_NEWNET) {
        // Whatever the agent did from now on would be in a container's network. Its end
        // is that of the machine, which the host sees.
        log::error!("leaving the network namespace of a container: {e}");
        std::process::abort();
    }
    result
}

/// Runs the work on a thread that may go to another namespace, because nobody uses
/// it afterwards.
async fn in_thread(work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("network".into())
        .spawn(move || {
            // Nobody waits any more when the agent is ending.
            let _ = sender.send(work());
        })
        .map_err(NetworkError::io("starting a thread"))?;
    match receiver.await {
        Ok(result) => result,
        Err(_) => Err(NetworkError::io("the thread")(io::Error::other(
            "it panicked",
        ))),
    }
}

/// What does not depend on the state of anything.
fn check(request: &ApplyRequest) -> Result<()> {
    let invalid = |what: &str| Err(NetworkError::Invalid(what.to_owned()));
    if request.interfaces.len() > MAX_INTERFACES {
        return invalid("too many interfaces");
    }
    for Interface {
        name,
        device_mac,
        mac,
        sysctls,
        ..
    } in &request.interfaces
    {
        let plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '/';
        if name.is_empty()
            || name.len() > MAX_NAME
            || name == "."
            || name == ".."
            || !name.chars().all(plain)
        {
            return invalid("the name of an interface");
        }
        if device_mac.len() != 6 || mac.len() != 6 {
            return invalid("a hardware address");
        }
        if !sysctls.iter().all(settings::is_valid) {
            return invalid("a setting");
        }
    }
    Ok(())
}

/// Whether a request passes, and what the kernel gets of its messages.
#[cfg(any(test, fuzzing))]
pub(crate) fn judge(request: &ApplyRequest) -> (bool, Vec<Vec<u8>>) {
    (check(request).is_ok(), apply::messages(request))
}

#[async_trait]
impl Network for NetworkService {
    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let interfaces = self
            .containers
            .pid(&request.container_id)
            .map_err(NetworkError::from)
            .and_then(|pid| stats::of_process(pid).map_err(NetworkError::io("reading statistics")));
        match interfaces {
            Ok(interfaces) => Ok(StatsResponse {
                interfaces,
                ..StatsResponse::new()
            }),
            Err(e) => Err(Error::RpcStatus(get_status(e.code(), e.to_string()))),
        }
    }

    async fn apply(&self, _: &TtrpcContext, request: ApplyRequest) -> ttrpc::Result<ApplyResponse> {
        match self.make_so(request).await {
            Ok(()) => Ok(ApplyResponse::new()),
            Err(e) => Err(Error::RpcStatus(get_status(e.code(), e.to_string()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kuasar_runv_protocol::network::Sysctl;

    fn request(change: impl FnOnce(&mut Interface)) -> Result<()> {
        let mut interface = Interface {
            name: "eth0".into(),
            device_mac: vec![2, 0, 0, 0, 0, 1],
            mac: vec![2, 0, 0, 0, 0, 1],
            ..Interface::default()
        };
        change(&mut interface);
        check(&ApplyRequest {
            interfaces: vec![interface],
            ..ApplyRequest::default()
        })
    }

    #[test]
    fn requests_that_make_no_sense_are_refused() {
        request(|_| ()).unwrap();
        for name in ["", ".", "..", "a/b", "a b", "a\n", "0123456789abcdef"] {
            assert!(request(|i| i.name = name.into()).is_err(), "{name:?}");
        }
        assert!(request(|i| i.mac = vec![1]).is_err());
        assert!(request(|i| i.device_mac = Vec::new()).is_err());
        for (family, name) in [("ipv4", "../x"), ("../..", "rp_filter"), ("ipv6", "")] {
            let sysctl = Sysctl {
                family: family.into(),
                name: name.into(),
                value: "1".into(),
                ..Sysctl::default()
            };
            assert!(request(|i| i.sysctls = vec![sysctl]).is_err(), "{name}");
        }
    }
}
