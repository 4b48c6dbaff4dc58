//! Calls about volumes that live in the guest.

use std::path::PathBuf;

use kuasar_runv_protocol::storage::{
    AddVolumeRequest, AddVolumeResponse, ForgetRequest, RemoveVolumeRequest,
};

use super::{Agent, Error};

impl Agent {
    /// Makes a volume. What comes back is for the guest again.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn add_volume(&self, request: &AddVolumeRequest) -> Result<AddVolumeResponse, Error> {
        self.storage
            .add_volume(self.context(), request)
            .map_err(|e| self.error(e))
    }

    /// Has the guest write a volume back and let go of it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn remove_volume(&self, name: &str) -> Result<(), Error> {
        let request = RemoveVolumeRequest {
            name: name.to_owned(),
            ..Default::default()
        };
        self.storage
            .remove_volume(self.context(), &request)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// Has the guest forget paths of the shared directory.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn forget(&self, paths: &[PathBuf]) -> Result<(), Error> {
        let paths = paths.iter().map(|path| path.to_string_lossy().into_owned());
        let request = ForgetRequest {
            paths: paths.collect(),
            ..Default::default()
        };
        self.storage
            .forget(self.context(), &request)
            .map(drop)
            .map_err(|e| self.error(e))
    }
}
