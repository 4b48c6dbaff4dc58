//! The pod's volumes that live in the guest: disks that the host attaches, huge
//! pages, and what stands for sockets of the host. The service of `storage.proto`.
//!
//! A volume is mounted below [`GUEST_VOLUMES_DIR`] in the agent's mount namespace,
//! once for all containers, which bind it from there; a disk without a file system
//! is its device node. What it takes to make one may block for long (a device that
//! appears, a journal that is replayed), so it is done on a thread of its own.

mod disk;
mod huge_pages;
mod served;
mod socket;
mod uevents;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use kuasar_runv_protocol::storage::add_volume_request::Kind;
use kuasar_runv_protocol::storage::{
    AddVolumeRequest, AddVolumeResponse, ForgetRequest, ForgetResponse, RemoveVolumeRequest,
    RemoveVolumeResponse,
};
use kuasar_runv_protocol::storage_ttrpc::Storage;
use kuasar_runv_protocol::{GUEST_SHARE_DIR, GUEST_VOLUMES_DIR};
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, get_status};

use self::disk::Disk;
use self::huge_pages::HugePages;
use self::served::ServedFiles;
use self::socket::Socket;
use crate::transport::Transport;

/// Most volumes of a pod; a machine has fewer places for disks.
const MAX_VOLUMES: usize = 256;

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Deadline(String),
    #[error("{context}: {source}")]
    Io { context: String, source: io::Error },
}

impl Error {
    fn io<E: Into<io::Error>>(context: impl Into<String>) -> impl FnOnce(E) -> Error {
        let context = context.into();
        move |source| Error::Io {
            context,
            source: source.into(),
        }
    }
}

type Result<T> = std::result::Result<T, Error>;

enum Volume {
    Disk(Disk),
    Files(ServedFiles),
    HugePages(HugePages),
    Socket(Socket),
}

impl Volume {
    fn make(name: &str, kind: Option<Kind>, transport: &Transport) -> Result<Volume> {
        match kind {
            Some(Kind::Disk(wanted)) if wanted.fs_type == served::VIRTIO_FS => {
                ServedFiles::mount(name, &wanted).map(Volume::Files)
            }
            Some(Kind::Disk(wanted)) => Disk::find(name, &wanted).map(Volume::Disk),
            Some(Kind::HugePages(wanted)) => {
                HugePages::reserve(name, &wanted).map(Volume::HugePages)
            }
            Some(Kind::Socket(wanted)) => {
                Socket::listen(name, &wanted, transport).map(Volume::Socket)
            }
            _ => Err(Error::Invalid("a volume of an unknown kind".into())),
        }
    }

    fn answer(&self) -> AddVolumeResponse {
        let (path, (major, minor)) = match self {
            Volume::Disk(disk) => (disk.path(), disk.number()),
            Volume::Files(files) => (files.path(), (0, 0)),
            Volume::HugePages(pages) => (pages.path(), (0, 0)),
            Volume::Socket(socket) => (socket.path(), (0, 0)),
        };
        AddVolumeResponse {
            path: path.to_string_lossy().into_owned(),
            major,
            minor,
            ..AddVolumeResponse::new()
        }
    }

    fn remove(&mut self) -> Result<()> {
        match self {
            Volume::Disk(disk) => disk.remove(),
            Volume::Files(files) => files.remove(),
            Volume::HugePages(pages) => pages.remove(),
            Volume::Socket(socket) => socket.remove(),
        }
    }
}

/// The service.
pub struct StorageService {
    transport: Transport,
    /// Held while one is made or removed: there is one at a time.
    volumes: Arc<Mutex<HashMap<String, Volume>>>,
}

impl StorageService {
    /// The transport is for sockets of the host.
    #[must_use]
    pub fn new(transport: Transport) -> StorageService {
        StorageService {
            transport,
            volumes: Arc::default(),
        }
    }

    async fn in_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut HashMap<String, Volume>) -> Result<T> + Send + 'static,
    ) -> ttrpc::Result<T> {
        let volumes = Arc::clone(&self.volumes);
        let done = tokio::task::spawn_blocking(move || {
            work(&mut volumes.lock().unwrap_or_else(PoisonError::into_inner))
        });
        let status = |code, message: String| ttrpc::Error::RpcStatus(get_status(code, message));
        match done.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(e)) => {
                let code = match &e {
                    Error::Invalid(_) => Code::INVALID_ARGUMENT,
                    Error::Deadline(_) => Code::DEADLINE_EXCEEDED,
                    Error::Io { .. } => Code::INTERNAL,
                };
                Err(status(code, e.to_string()))
            }
            Err(e) => Err(status(Code::INTERNAL, e.to_string())),
        }
    }
}

#[async_trait]
impl Storage for StorageService {
    async fn add_volume(
        &self,
        _: &TtrpcContext,
        request: AddVolumeRequest,
    ) -> ttrpc::Result<AddVolumeResponse> {
        let transport = self.transport.clone();
        self.in_thread(move |volumes| {
            let name = request.name;
            if let Some(volume) = volumes.get(&name) {
                return Ok(volume.answer());
            }
            if volumes.len() >= MAX_VOLUMES {
                return Err(Error::Invalid(format!("more than {MAX_VOLUMES} volumes")));
            }
            let volume = Volume::make(plain(&name)?, request.kind, &transport)?;
            let answer = volume.answer();
            volumes.insert(name, volume);
            Ok(answer)
        })
        .await
    }

    async fn remove_volume(
        &self,
        _: &TtrpcContext,
        request: RemoveVolumeRequest,
    ) -> ttrpc::Result<RemoveVolumeResponse> {
        self.in_thread(move |volumes| {
            if let Some(volume) = volumes.get_mut(&request.name) {
                volume.remove()?;
                volumes.remove(&request.name);
            }
            Ok(RemoveVolumeResponse::new())
        })
        .await
    }

    async fn forget(
        &self,
        _: &TtrpcContext,
        request: ForgetRequest,
    ) -> ttrpc::Result<ForgetResponse> {
        self.in_thread(move |_| {
            for path in request.paths {
                // The driver asks the host, hears that it is gone, and drops all
                // that it knew below it: there is nothing to do with the answer.
                drop(fs::symlink_metadata(Path::new(GUEST_SHARE_DIR).join(path)));
            }
            Ok(ForgetResponse::new())
        })
        .await
    }
}

/// A name that is one component of a path.
fn plain(name: &str) -> Result<&str> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(Error::Invalid(format!("{name:?} is not a name")));
    }
    Ok(name)
}

#[cfg(any(test, fuzzing))]
pub(crate) fn is_plain(name: &str) -> bool {
    plain(name).is_ok()
}

/// Makes the directory that a volume is mounted on.
fn make_place(name: &str) -> Result<PathBuf> {
    let place = Path::new(GUEST_VOLUMES_DIR).join(name);
    fs::create_dir_all(&place).map_err(Error::io(format!("making {}", place.display())))?;
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_file_names() {
        assert_eq!(plain("disk-1").unwrap(), "disk-1");
        for name in ["", ".", "..", "a/b", "/a", "a\0b"] {
            assert!(plain(name).is_err(), "{name:?}");
        }
    }
}
