//! What the containers of a pod share, as the commands ask for it.

use std::os::fd::BorrowedFd;

use kuasar_runv_protocol::socket::Token;

use super::control::{DiskMode, GuestDisk, Identities, Reply, Request, Unused};
use super::{Error, REQUEST_DEADLINE, Sandbox};

impl Sandbox {
    /// Lets a container use the volume `name` of the pod, of whose source `tree` is a
    /// clone.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn share_volume(
        &self,
        container: &str,
        name: &str,
        writes: bool,
        tree: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let request = Request::ShareVolume {
            container: container.to_owned(),
            name: name.to_owned(),
            writes,
        };
        self.connection
            .call(&request, &[tree], REQUEST_DEADLINE)
            .map(drop)
            .map_err(|e| self.control_error(e))
    }

    /// Lets a container use a disk; returns what it is in the guest. It is attached now
    /// if `file`, the disk, is given; `None` when it is neither given nor attached.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::Refused`] when it is used in another way.
    pub fn use_disk(
        &self,
        container: &str,
        key: &str,
        mode: &DiskMode,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Option<GuestDisk>, Error> {
        let request = Request::UseDisk {
            container: container.to_owned(),
            key: key.to_owned(),
            mode: mode.clone(),
        };
        let reply = self.reply(&request, file.as_slice())?;
        Ok(reply.volume.map(|name| GuestDisk {
            name,
            place: reply.place.unwrap_or_default(),
        }))
    }

    /// Lets a container use a volume that the guest makes by itself; returns its name
    /// there.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn use_volume(&self, container: &str, key: &str) -> Result<String, Error> {
        let request = Request::UseVolume {
            container: container.to_owned(),
            key: key.to_owned(),
        };
        self.reply(&request, &[])?
            .volume
            .ok_or_else(|| Error::Refused("the sandboxer's answer has no volume".into()))
    }

    /// Lets a container use a socket of the host; returns its name in the guest and
    /// what the guest shows to use it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn use_socket(
        &self,
        container: &str,
        key: &str,
        identities: &Identities,
        socket: BorrowedFd<'_>,
    ) -> Result<(String, Token), Error> {
        let request = Request::UseSocket {
            container: container.to_owned(),
            key: key.to_owned(),
            identities: identities.clone(),
        };
        let reply = self
            .connection
            .call(&request, &[socket], REQUEST_DEADLINE)
            .map_err(|e| self.control_error(e))?;
        let nothing = || Error::Refused("the sandboxer's answer has no socket".into());
        reply.volume.zip(reply.token).ok_or_else(nothing)
    }

    fn reply(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, Error> {
        self.connection
            .call(request, fds, REQUEST_DEADLINE)
            .map_err(|e| self.control_error(e))
    }

    /// Takes away what is shared for a container alone; returns what the guest is to
    /// be told of it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn unshare(&self, container: &str) -> Result<Unused, Error> {
        let request = Request::Unshare {
            container: container.to_owned(),
        };
        self.connection
            .call(&request, &[], REQUEST_DEADLINE)
            .map(|reply| reply.unused.unwrap_or_default())
            .map_err(|e| self.control_error(e))
    }

    /// Takes away a volume that the guest has let go of.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn remove_volume(&self, name: &str) -> Result<(), Error> {
        let request = Request::RemoveVolume {
            name: name.to_owned(),
        };
        self.connection
            .call(&request, &[], REQUEST_DEADLINE)
            .map(drop)
            .map_err(|e| self.control_error(e))
    }
}
