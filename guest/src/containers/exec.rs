//! The other processes of a container.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use kuasar_runv_protocol::stream::MAX_ID_LEN;
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};

use super::preserved::Preserved;
use super::stdio::{Pipes, Stdio};
use super::{Container, ContainerError, Containers, Result, WantedDescriptor};
use crate::process::{Process, SignalError};
use crate::sys;
use crate::zygote::{ExecRequest, Request};

/// What the host asks a process to be.
#[derive(Debug)]
pub struct NewProcess {
    /// When the request came, see [`sys::boottime_us`].
    pub received_us: u64,
    pub container_id: String,
    pub exec_id: String,
    /// `process` of a config.json.
    pub process: Vec<u8>,
    /// Which of stdin, stdout and stderr a stand-in connects.
    pub stdio: [bool; 3],
    pub ignore_paused: bool,
    /// Path below the container's cgroup.
    pub cgroup: String,
    pub umask: u32,
    pub plain_newlines: bool,
    pub preserved: Vec<WantedDescriptor>,
    pub output_outlives_process: bool,
}

impl Container {
    /// The running process with this exec id.
    pub(super) fn exec_of(&self, exec_id: &str) -> Result<Arc<Process>> {
        match self.execs().get(exec_id) {
            Some(Some(process)) => Ok(Arc::clone(process)),
            Some(None) | None => Err(SignalError::NotRunning.into()),
        }
    }

    fn execs(
        &self,
    ) -> std::sync::MutexGuard<'_, std::collections::HashMap<String, Option<Arc<Process>>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Containers {
    /// Starts a process in a container and returns its pid; its program runs then.
    ///
    /// # Errors
    /// See [`ContainerError`]; there is no process then.
    pub async fn exec(self: Arc<Self>, new: NewProcess) -> Result<i32> {
        if new.exec_id.is_empty() || new.exec_id.len() > MAX_ID_LEN {
            return Err(ContainerError::Invalid("invalid exec ID".to_owned()));
        }
        let container = self.get(&new.container_id)?;
        if container.process.has_ended() {
            return Err(ContainerError::ExecStopped);
        }
        {
            let mut execs = container.execs();
            if execs.contains_key(&new.exec_id) {
                return Err(ContainerError::ExecExists);
            }
            execs.insert(new.exec_id.clone(), None);
        }
        let started = self.start_process(&container, &new).await;
        match started {
            Ok(process) => {
                let pid = process.pid;
                let known = Some(Arc::clone(&process));
                container.execs().insert(new.exec_id.clone(), known);
                self.report_exec_end(container, new, process);
                Ok(pid)
            }
            Err(e) => {
                container.execs().remove(&new.exec_id);
                self.streams.forget_exec(&new.container_id, &new.exec_id);
                Err(match container.process.has_ended() {
                    // What failed is entering what went away with it.
                    true => ContainerError::ExecStopped,
                    false => e,
                })
            }
        }
    }

    async fn start_process(
        &self,
        container: &Arc<Container>,
        new: &NewProcess,
    ) -> Result<Arc<Process>> {
        let frozen = container.is_paused()?;
        if frozen && !new.ignore_paused {
            return Err(ContainerError::ExecPaused);
        }
        let cgroup = container.cgroup.below(&new.cgroup).ok_or_else(|| {
            ContainerError::Invalid(format!("{} is not a sub cgroup path", new.cgroup))
        })?;
        let (pipes, theirs) = Pipes::make(new.stdio).map_err(ContainerError::io("making pipes"))?;
        let preserved = Preserved::make(&new.preserved).await?;
        let process = in_memory(&new.process).map_err(ContainerError::io("passing the process"))?;
        let init = container
            .process
            .pidfd()
            .try_clone()
            .map_err(ContainerError::io("passing the container's process"))?;
        let request = Request::Exec(ExecRequest {
            container_id: new.container_id.clone(),
            dir: container.dir.clone(),
            stdio: new.stdio,
            no_new_keyring: container.no_new_keyring,
            plain_newlines: new.plain_newlines,
            preserved: preserved.count(),
            late_cgroup: frozen,
            cgroup,
            umask: new.umask,
            init_pid: container.process.pid,
        });
        let with: Vec<_> = [&process, &init]
            .into_iter()
            .chain(&theirs)
            .chain(preserved.theirs())
            .map(AsFd::as_fd)
            .collect();
        let created = self.zygote.submit(&request, &with).await?;
        let (process, hold) = self.adopt(created)?;
        drop(hold);
        // It has no start to wait for.
        process.note_start();
        let stdio = Stdio {
            pipes,
            preserved: preserved.into_ours(),
            oom: None,
            outlives_process: new.output_outlives_process,
        };
        self.attach_streams(&new.container_id, &new.exec_id, &process, stdio);
        Ok(process)
    }

    /// Forgets the process and reports its end when it comes.
    fn report_exec_end(&self, of: Arc<Container>, new: NewProcess, process: Arc<Process>) {
        let events = self.events.clone();
        sys::spawn(async move {
            let status = process.ended().await;
            let took = sys::boottime_us().saturating_sub(new.received_us);
            of.oom.report();
            of.execs().remove(&new.exec_id);
            log::debug!("{} {}: {status:?}", new.container_id, new.exec_id);
            events.exited(&new.container_id, &new.exec_id, status, took);
        });
    }
}

/// A file without a name that holds these bytes.
fn in_memory(bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = memfd_create(c"process", MemFdCreateFlag::MFD_CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}
