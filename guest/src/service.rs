//! The ttrpc services, as far as they are ones: requests to [`Containers`] and
//! [`Machine`], failures to statuses.

use std::sync::Arc;

use async_trait::async_trait;
use kuasar_runv_protocol::agent::{
    CreateContainerRequest, CreateContainerResponse, DeleteContainerRequest, Empty,
    ExecProcessRequest, ExecProcessResponse, GetInfoResponse, GetStatsRequest, GetStatsResponse,
    ListProcessesRequest, ListProcessesResponse, PauseContainerRequest, ResumeContainerRequest,
    SignalProcessRequest, StartContainerRequest, UpdateContainerRequest, WatchOomRequest,
};
use kuasar_runv_protocol::agent_ttrpc::Agent;
use kuasar_runv_protocol::resources::{GrowRequest, GrowResponse};
use kuasar_runv_protocol::resources_ttrpc::Resources;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, Error, get_status};

use crate::cgroup::settings::Setting;
use crate::containers::{ContainerError, Containers, NewContainer, NewProcess};
use crate::events::{AGENT_VERSION, kernel_release};
use crate::machine::Machine;
use crate::process::SignalError;
use crate::sys::boottime_us;
use crate::zygote::ZygoteError;

/// Largest valid signal number.
const MAX_SIGNAL: u32 = 64;

/// The service of `agent.proto`.
pub struct AgentService {
    containers: Arc<Containers>,
}

impl AgentService {
    #[must_use]
    pub fn new(containers: Arc<Containers>) -> AgentService {
        AgentService { containers }
    }
}

fn status(code: Code, message: impl Into<String>) -> Error {
    Error::RpcStatus(get_status(code, message.into()))
}

fn to_status(error: &ContainerError) -> Error {
    let code = match error {
        ContainerError::NotFound => Code::NOT_FOUND,
        ContainerError::Exists | ContainerError::ExecExists => Code::ALREADY_EXISTS,
        ContainerError::Signal(SignalError::NotRunning)
        | ContainerError::AlreadyStarted
        | ContainerError::CannotJoin { .. }
        | ContainerError::Stopped
        | ContainerError::ExecStopped
        | ContainerError::ExecPaused
        | ContainerError::Paused
        | ContainerError::Busy => Code::FAILED_PRECONDITION,
        ContainerError::Unkillable
        | ContainerError::Unfreezable(_)
        | ContainerError::Helper(ZygoteError::Deadline(_)) => Code::DEADLINE_EXCEEDED,
        e if e.is_invalid_spec() => Code::INVALID_ARGUMENT,
        _ => Code::INTERNAL,
    };
    status(code, error.to_string())
}

/// Runs to its end even when the caller gives up, so that no container is left
/// half made or half removed.
async fn to_the_end<T: Send + 'static>(
    operation: impl Future<Output = Result<T, ContainerError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(operation).await {
        Ok(result) => result.map_err(|e| to_status(&e)),
        Err(e) => Err(status(Code::INTERNAL, e.to_string())),
    }
}

#[async_trait]
impl Agent for AgentService {
    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let new = NewContainer {
            id: request.container_id,
            spec: request.spec_json,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            no_pivot: request.no_pivot,
            no_new_keyring: request.no_new_keyring,
            plain_newlines: request.plain_newlines,
            preserved: request.preserved,
            joins: request.joins,
            shared_memory: request.shared_memory,
            seccomp: request.seccomp,
        };
        let pid = to_the_end(Arc::clone(&self.containers).create(new)).await?;
        Ok(CreateContainerResponse {
            pid,
            ..CreateContainerResponse::new()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.containers
            .start(&request.container_id)
            .await
            .map_err(|e| to_status(&e))?;
        Ok(Empty::new())
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        let signal = match request.signal {
            signal @ 1..=MAX_SIGNAL => signal as i32,
            signal => {
                return Err(status(
                    Code::INVALID_ARGUMENT,
                    format!("invalid signal {signal}"),
                ));
            }
        };
        self.containers
            .signal(&request.container_id, &request.exec_id, signal, request.all)
            .map_err(|e| to_status(&e))?;
        Ok(Empty::new())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: DeleteContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        to_the_end(async move { containers.delete(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn get_info(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<GetInfoResponse> {
        Ok(GetInfoResponse {
            agent_version: AGENT_VERSION.to_owned(),
            kernel_release: kernel_release().map_err(|e| status(Code::INTERNAL, e.to_string()))?,
            ..GetInfoResponse::new()
        })
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        let new = NewProcess {
            received_us: boottime_us(),
            container_id: request.container_id,
            exec_id: request.exec_id,
            process: request.process_json,
            stdio: [request.stdin, request.stdout, request.stderr],
            ignore_paused: request.ignore_paused,
            cgroup: request.cgroup,
            umask: request.umask,
            plain_newlines: request.plain_newlines,
            preserved: request.preserved,
            output_outlives_process: request.output_outlives_process,
        };
        let pid = to_the_end(Arc::clone(&self.containers).exec(new)).await?;
        Ok(ExecProcessResponse {
            pid,
            ..ExecProcessResponse::new()
        })
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ListProcessesRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        self.containers
            .list_processes(&request.container_id)
            .await
            .map_err(|e| to_status(&e))
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: PauseContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        to_the_end(async move { containers.pause(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ResumeContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.containers
            .resume(&request.container_id)
            .map_err(|e| to_status(&e))?;
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        to_the_end(async move {
            let settings = request.settings.into_iter().map(Setting::from).collect();
            containers.update(&request.container_id, settings).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn get_stats(
        &self,
        _: &TtrpcContext,
        request: GetStatsRequest,
    ) -> ttrpc::Result<GetStatsResponse> {
        self.containers
            .stats(&request.container_id)
            .map_err(|e| to_status(&e))
    }

    async fn watch_oom(&self, _: &TtrpcContext, request: WatchOomRequest) -> ttrpc::Result<Empty> {
        self.containers
            .watch_oom(&request.container_id)
            .map_err(|e| to_status(&e))?;
        Ok(Empty::new())
    }
}

/// The service of `resources.proto`.
pub struct ResourcesService {
    machine: Machine,
}

impl ResourcesService {
    #[must_use]
    pub fn new(machine: Machine) -> ResourcesService {
        ResourcesService { machine }
    }
}

#[async_trait]
impl Resources for ResourcesService {
    async fn grow(&self, _: &TtrpcContext, request: GrowRequest) -> ttrpc::Result<GrowResponse> {
        // Also what came too late: the text says how far it got.
        let grown = self.machine.grow(&request).await;
        grown.map_err(|e| status(Code::INTERNAL, e.to_string()))
    }
}
