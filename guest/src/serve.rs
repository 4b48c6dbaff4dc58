//! The agent's life after boot: one runtime, one thread, until the machine ends.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use kuasar_runv_protocol::agent_ttrpc::create_agent;
use kuasar_runv_protocol::network_ttrpc::create_network;
use kuasar_runv_protocol::resources_ttrpc::create_resources;
use kuasar_runv_protocol::storage_ttrpc::create_storage;
use kuasar_runv_protocol::{LOOPBACK_PORT, STREAM_PORT};
use ttrpc::r#async::Server;

use crate::containers::Containers;
use crate::debug_console;
use crate::events::Events;
use crate::loopback::Loopback;
use crate::machine::Machine;
use crate::network::NetworkService;
use crate::reaper::Reaper;
use crate::service::{AgentService, ResourcesService};
use crate::storage::StorageService;
use crate::streams::Streams;
use crate::sys;
use crate::transport::Transport;
use crate::zygote::Zygote;

/// What differs between a machine and a test.
#[derive(Debug)]
pub struct Settings {
    pub transport: Transport,
    pub debug_console: bool,
    /// CLOCK_BOOTTIME when the agent got control, in microseconds.
    pub start_us: u64,
    /// Where the containers' private directories are made.
    pub state_dir: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("starting the runtime: {0}")]
    Runtime(io::Error),
    #[error("listening for streams: {0}")]
    Streams(io::Error),
    #[error("listening for loopback interfaces: {0}")]
    Loopback(io::Error),
    #[error("serving requests: {0}")]
    Ttrpc(#[from] ttrpc::Error),
    #[error("telling the host that the agent is ready: {0}")]
    Events(io::Error),
}

/// Serves the host. Does not return unless something failed.
///
/// # Errors
/// See [`ServeError`].
pub fn run(settings: Settings, zygote: Zygote) -> Result<(), ServeError> {
    if let Err(e) = sys::let_others_finish() {
        log::warn!("scheduling policy: {e}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)?;
    runtime.block_on(serve(settings, zygote))
}

async fn serve(settings: Settings, zygote: Zygote) -> Result<(), ServeError> {
    let transport = &settings.transport;
    let reaper = Reaper::start().map_err(ServeError::Runtime)?;
    let listener = transport.listen(STREAM_PORT).map_err(ServeError::Streams)?;
    let streams = Streams::serve(listener);
    let loopback = transport
        .listen(LOOPBACK_PORT)
        .map_err(ServeError::Loopback)?;
    // The host may send its first request as soon as it hears that the agent is
    // ready, so the server listens before that.
    let server = Server::new().bind(&transport.ttrpc_address())?;
    if settings.debug_console
        && let Err(e) = debug_console::serve(transport)
    {
        log::warn!("no debug console: {e}");
    }
    let events = Events::connect(transport, settings.start_us)
        .await
        .map_err(ServeError::Events)?;
    let containers = Arc::new(Containers::new(
        settings.state_dir,
        zygote,
        reaper,
        streams,
        events,
    ));
    Loopback::serve(loopback, Arc::clone(&containers));
    let network = create_network(Arc::new(NetworkService::new(Arc::clone(&containers))));
    let service = create_agent(Arc::new(AgentService::new(containers)));
    let machine = Machine::booted().map_err(ServeError::Runtime)?;
    let resources = create_resources(Arc::new(ResourcesService::new(machine)));
    let storage = create_storage(Arc::new(StorageService::new(transport.clone())));
    let mut server = server
        .register_service(service)
        .register_service(network)
        .register_service(storage)
        .register_service(resources);
    server.start().await?;
    std::future::pending().await
}
