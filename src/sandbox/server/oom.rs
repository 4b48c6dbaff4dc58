//! Containers that ran out of memory: their engines are told by the host's kernel
//! ([`host_oom`]), once for each container, by a thread of its own.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kuasar_runv_protocol::agent::Oom;
use kuasar_runv_protocol::resources::{FromHost, OomNoted};

use super::Sandboxer;
use crate::container::check_id;
use crate::container::state::ContainerRecord;
use crate::root::Root;
use crate::sandbox::control::{Notice, SandboxerConfig};
use crate::sandbox::host_oom;
use crate::sandbox::record::SandboxRecord;
use crate::sys::process::ProcessRef;
use crate::sys::wake::Wake;

/// How far the report of a container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Report {
    /// And whether the agent waits for it.
    Running {
        awaited: bool,
    },
    Done,
}

/// The reports of the pod's containers. There is at most one for each container on
/// record, whatever the guest says.
pub(super) struct OomReports {
    root: Root,
    sandbox_id: String,
    reports: HashMap<String, Report>,
    /// Held while the machine is in another cgroup.
    one_at_a_time: Arc<Mutex<()>>,
    done: Sender<String>,
    finished: Receiver<String>,
    wake: Arc<Wake>,
}

impl AsFd for OomReports {
    /// Readable when a report is done.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl OomReports {
    pub(super) fn new(config: &SandboxerConfig) -> io::Result<OomReports> {
        let (done, finished) = channel();
        Ok(OomReports {
            root: Root::new(Some(config.root.clone())),
            sandbox_id: config.id.clone(),
            reports: HashMap::new(),
            one_at_a_time: Arc::default(),
            done,
            finished,
            wake: Arc::new(Wake::new()?),
        })
    }

    /// Whether the host's kernel is being told something.
    pub(super) fn is_busy(&self) -> bool {
        let mut reports = self.reports.values();
        reports.any(|report| matches!(report, Report::Running { .. }))
    }

    /// The container is being deleted.
    pub(super) fn forget(&mut self, container: &str) {
        self.reports.remove(container);
    }

    /// Starts the report of a container that has none. Whether it is done, or never
    /// will be.
    fn begin(&mut self, container: &str, awaited: bool) -> bool {
        match self.reports.get_mut(container) {
            Some(Report::Done) => return true,
            Some(Report::Running { awaited: before }) => {
                *before |= awaited;
                return false;
            }
            None => {}
        }
        match self.start(container) {
            Ok(()) => {
                let report = Report::Running { awaited };
                self.reports.insert(container.to_owned(), report);
                false
            }
            Err(e) => {
                log::warn!("that {container} has no memory left cannot be reported: {e}");
                true
            }
        }
    }

    fn start(&self, container: &str) -> io::Result<()> {
        let (cgroups, machine) = self.look_up(container)?;
        let container = container.to_owned();
        let (turn, done, wake) = (
            Arc::clone(&self.one_at_a_time),
            self.done.clone(),
            Arc::clone(&self.wake),
        );
        std::thread::Builder::new()
            .name("oom".into())
            .spawn(move || {
                {
                    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
                    let start = Instant::now();
                    match host_oom::report(&cgroups, &machine) {
                        Ok(()) => log::info!(
                            "{container} has no memory left: reported within {} ms",
                            start.elapsed().as_millis()
                        ),
                        Err(e) => {
                            log::warn!("{container} has no memory left, which is not reported: {e}")
                        }
                    }
                }
                // Otherwise the sandboxer is ending.
                if done.send(container).is_ok() {
                    let _ = wake.wake();
                }
            })
            .map(drop)
    }

    /// The cgroups of a container of this pod, and the processes of the machine. The
    /// name comes from the guest.
    fn look_up(&self, container: &str) -> io::Result<(Vec<PathBuf>, Vec<i32>)> {
        check_id(container).map_err(io::Error::other)?;
        let record = ContainerRecord::read(&self.root, container).map_err(io::Error::other)?;
        let sandbox =
            SandboxRecord::read(&self.root, &self.sandbox_id).map_err(io::Error::other)?;
        let is_ours = record.sandbox_id == self.sandbox_id
            && (record.member_of.is_none() || record.member_of == sandbox.sandboxer);
        if !is_ours {
            return Err(io::Error::other("it is not a container of this pod"));
        }
        let machine: Vec<Option<ProcessRef>> = vec![sandbox.sandboxer, sandbox.vm];
        let machine = machine.into_iter().flatten().map(|process| process.pid);
        Ok((record.cgroups, machine.collect()))
    }
}

impl Sandboxer {
    /// The guest has killed processes of a container for lack of memory.
    pub(super) fn out_of_memory(&mut self, oom: &Oom) {
        self.notify(&oom.container_id, Notice::Oom);
        if self.oom.begin(&oom.container_id, oom.awaited) && oom.awaited {
            self.tell_agent(&noted(&oom.container_id));
        }
    }

    pub(super) fn oom_reports(&mut self) {
        if let Err(e) = self.oom.wake.reset() {
            log::warn!("reading an event descriptor: {e}");
        }
        while let Ok(container) = self.oom.finished.try_recv() {
            let report = self.oom.reports.get_mut(&container);
            // It may have been deleted meanwhile.
            let before = report.map(|report| std::mem::replace(report, Report::Done));
            if before == Some(Report::Running { awaited: true }) {
                self.tell_agent(&noted(&container));
            }
        }
    }
}

fn noted(container: &str) -> FromHost {
    let mut message = FromHost::new();
    message.set_oom_noted(OomNoted {
        container_id: container.to_owned(),
        ..OomNoted::new()
    });
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reports(root: &Root) -> OomReports {
        let (done, finished) = channel();
        OomReports {
            root: root.clone(),
            sandbox_id: "pod".into(),
            reports: HashMap::new(),
            one_at_a_time: Arc::default(),
            done,
            finished,
            wake: Arc::new(Wake::new().unwrap()),
        }
    }

    /// A hostile guest makes nothing grow, and names nobody else's container.
    #[test]
    fn only_containers_of_the_pod_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(Some(dir.path().to_owned()));
        root.create().unwrap();
        std::fs::create_dir(root.sandbox("pod")).unwrap();
        let sandbox = SandboxRecord::new("pod", 1, &[]).unwrap();
        sandbox.write(&root).unwrap();
        for (id, sandbox_id) in [("mine", "pod"), ("other", "other")] {
            std::fs::create_dir(root.container(id)).unwrap();
            let record = ContainerRecord::new(id, sandbox_id, dir.path()).unwrap();
            record.write(&root).unwrap();
        }
        let mut reports = reports(&root);
        for name in ["", "..", "../mine", "nobody", "other"] {
            assert!(reports.begin(name, true), "{name}");
        }
        assert!(reports.reports.is_empty());
        // Once, however often it is said, and whoever begins to wait.
        assert!(!reports.begin("mine", false));
        assert!(!reports.begin("mine", true));
        assert_eq!(reports.finished.recv().unwrap(), "mine");
        assert_eq!(reports.reports["mine"], Report::Running { awaited: true });
        assert!(reports.is_busy());
        assert!(reports.finished.try_recv().is_err());
    }
}
