//! Requests about what the pod's containers share: mount trees, disks, volumes that
//! the guest makes.

use std::io;
use std::os::fd::OwnedFd;

use super::Sandboxer;
use crate::sandbox::control::{self, DiskMode, DiskSource, Identities, Reply, Unused, VIRTIO_FS};
use crate::sandbox::guest_volumes::Found;
use crate::vm::{BlockDevice, Device, VhostUserDevice, VhostUserKind};

impl Sandboxer {
    /// Attaches the disk unless it is attached.
    pub(super) fn use_disk(
        &mut self,
        container: &str,
        key: &str,
        mode: DiskMode,
        file: Option<OwnedFd>,
    ) -> io::Result<Reply> {
        let how = mode.clone();
        let name = match self.volumes.add(key, Some(mode), container)? {
            Found::Known(name) => name,
            Found::New(name) => {
                let Some(file) = file else {
                    self.volumes.forget(&name);
                    return Ok(Reply::default());
                };
                match self.vm.attach(&name, &device(&how, &name, file)) {
                    Ok(place) => self.volumes.place(&name, place.0),
                    Err(e) => {
                        self.volumes.forget(&name);
                        return Err(io::Error::other(e));
                    }
                }
                name
            }
        };
        Ok(Reply {
            place: self.volumes.place_of(&name),
            ..named(name)
        })
    }

    pub(super) fn use_volume(&mut self, container: &str, key: &str) -> io::Result<Reply> {
        let (Found::Known(name) | Found::New(name)) = self.volumes.add(key, None, container)?;
        Ok(named(name))
    }

    /// Has connections of the guest with the token in the answer go to the socket.
    pub(super) fn use_socket(
        &mut self,
        container: &str,
        key: &str,
        identities: Identities,
        socket: OwnedFd,
    ) -> io::Result<Reply> {
        let (Found::Known(name) | Found::New(name)) = self.volumes.add(key, None, container)?;
        let token = self
            .sockets
            .offer(&name, identities, socket)
            .inspect_err(|_| self.volumes.forget(&name))?;
        Ok(Reply {
            token: Some(token),
            ..named(name)
        })
    }

    pub(super) fn unshare(&mut self, container: &str) -> Reply {
        self.oom.forget(container);
        Reply {
            unused: Some(Unused {
                paths: self.share.release(container),
                volumes: self.volumes.release(container),
            }),
            ..Reply::default()
        }
    }

    /// Answered when the guest has let go of the disk.
    pub(super) fn remove_volume(
        &mut self,
        client: usize,
        name: String,
    ) -> io::Result<Option<Reply>> {
        if !self.volumes.is_unused_disk(&name)? {
            self.sockets.withdraw(&name);
            return Ok(Some(Reply::default()));
        }
        self.vm.detach(&name).map_err(io::Error::other)?;
        self.clients[client].waits_for_removal = Some(name);
        Ok(None)
    }

    /// The machine has let go of a device.
    pub(super) fn detached(&mut self, name: &str) {
        self.volumes.forget(name);
        for client in &mut self.clients {
            if client.waits_for_removal.as_deref() == Some(name) {
                client.waits_for_removal = None;
                // A command that is gone is noticed when its channel is read.
                let _ = control::reply(&client.channel, &Reply::default());
            }
        }
    }
}

/// The device that a file, or a connection, is plugged in as.
fn device(mode: &DiskMode, name: &str, file: OwnedFd) -> Device {
    let kind = match (mode.source, mode.file_system.as_deref()) {
        (DiskSource::Program, Some(VIRTIO_FS)) => VhostUserKind::Fs {
            tag: name.to_owned(),
        },
        (DiskSource::Program, _) => VhostUserKind::Block,
        (DiskSource::Image | DiskSource::Device, _) => {
            return Device::Block(BlockDevice {
                file,
                is_device: mode.source == DiskSource::Device,
                read_only: mode.read_only,
            });
        }
    };
    Device::VhostUser(VhostUserDevice { socket: file, kind })
}

fn named(name: String) -> Reply {
    Reply {
        volume: Some(name),
        ..Reply::default()
    }
}
