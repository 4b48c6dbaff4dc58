//! Sockets of the host that a container binds. Another kernel cannot connect to them,
//! so the guest listens where they are and its connections go on to the host
//! (`sandbox::server::sockets`).

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kuasar_runv_protocol::socket::Token;
use kuasar_runv_protocol::storage;
use oci_spec::runtime::{LinuxIdMapping, Spec};

use super::super::guest_spec::Error;
use super::at;
use crate::sandbox::control::Identities;
use crate::sys::unix_socket;

/// A stream socket that a container uses.
#[derive(Debug)]
pub struct Socket {
    pub source: PathBuf,
    /// It and no other, whatever happens to the path.
    pub file: File,
    pub identities: Identities,
    mode: u32,
    owner: (u32, u32),
    inode: (u64, u64),
}

impl Socket {
    /// Names it among the pod's volumes.
    #[must_use]
    pub fn key(&self) -> String {
        let ((device, inode), who) = (self.inode, &self.identities);
        format!("socket {device:x}:{inode:x} {:?} {:?}", who.uids, who.gids)
    }

    /// What the guest is told.
    #[must_use]
    pub fn request(&self, token: Token) -> storage::Socket {
        storage::Socket {
            token: token.to_vec(),
            mode: self.mode,
            uid: self.owner.0,
            gid: self.owner.1,
            ..storage::Socket::new()
        }
    }
}

/// The socket that a bind mount of `source` stands for, if it is one that the guest can
/// connect to. Of datagrams and of packets only the file is there.
///
/// # Errors
/// [`Error::Volume`].
pub fn of_bind(source: &Path, spec: &Spec) -> Result<Option<Socket>, Error> {
    let is_socket = |metadata: &fs::Metadata| metadata.file_type().is_socket();
    if !fs::metadata(source).as_ref().is_ok_and(is_socket) {
        return Ok(None);
    }
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_PATH);
    let file = options.open(source).map_err(at(source))?;
    let metadata = file.metadata().map_err(at(source))?;
    if !is_socket(&metadata) {
        return Ok(None);
    }
    if unix_socket::takes_datagrams(&file).map_err(at(source))? {
        log::warn!(
            "{} takes datagrams: the container sees it and cannot reach it",
            source.display()
        );
        return Ok(None);
    }
    Ok(Some(Socket {
        source: source.to_owned(),
        file,
        identities: identities(spec),
        mode: metadata.mode() & 0o7777,
        owner: (metadata.uid(), metadata.gid()),
        inode: (metadata.dev(), metadata.ino()),
    }))
}

/// Who the container's processes can be on the host.
fn identities(spec: &Spec) -> Identities {
    let linux = spec.linux().as_ref();
    let ranges = |mappings: Option<&Vec<LinuxIdMapping>>| {
        let mappings = mappings.filter(|mappings| !mappings.is_empty())?;
        let ranges = mappings.iter().map(|m| (m.host_id(), m.size()));
        Some(ranges.collect())
    };
    Identities {
        uids: ranges(linux.and_then(|linux| linux.uid_mappings().as_ref())),
        gids: ranges(linux.and_then(|linux| linux.gid_mappings().as_ref())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use serde_json::json;

    use super::*;

    #[test]
    fn stream_sockets_are_told_from_others() {
        let spec = serde_json::from_value(json!({"ociVersion": "1.0.2"})).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let listener = UnixListener::bind(path("stream")).unwrap();
        let _datagrams = UnixDatagram::bind(path("datagrams")).unwrap();
        drop(UnixListener::bind(path("closed")).unwrap());
        fs::write(path("file"), "").unwrap();
        let socket = of_bind(&path("stream"), &spec).unwrap().unwrap();
        assert_eq!(socket.identities, Identities::default());
        assert!(of_bind(&path("closed"), &spec).unwrap().is_some());
        for name in ["datagrams", "file", "nothing"] {
            assert!(of_bind(&path(name), &spec).unwrap().is_none(), "{name}");
        }
        // Nobody has noticed.
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err());
    }

    #[test]
    fn a_user_namespace_limits_who_the_container_can_be() {
        let mappings = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
        let spec = json!({"ociVersion": "1.0.2", "linux": {"uidMappings": mappings, "gidMappings": mappings}});
        let who = identities(&serde_json::from_value(spec).unwrap());
        assert_eq!(who.uids, Some(vec![(1000, 10)]));
        assert_eq!(who.gids, who.uids);
    }
}
