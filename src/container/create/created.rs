//! A created container in the hands of the command that has made it, and how it is
//! removed again unless that keeps it.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::agent_client::Agent;
use crate::container::pod::Unreachable;
use crate::container::state::{ContainerRecord, Phase, Status};
use crate::container::terminal::CallersTerminal;
use crate::container::{Error, context, delete, hooks, network};
use crate::root::Root;
use crate::sandbox::Sandbox;
use crate::standin::spawn::StandIn;
use crate::sys::interrupt::Interrupt;
use crate::sys::lock::DirLock;
use crate::sys::process::ProcessRef;

/// A created container, still locked. Unless [`keep`](Created::keep) is called,
/// dropping it removes the container.
pub struct Created {
    pub agent: Agent,
    /// Where the container's terminal is to be shown, if it has one and the
    /// caller stays.
    pub terminal: Option<CallersTerminal>,
    pub(super) record: ContainerRecord,
    pub(super) root: Root,
    pub(super) sandbox: Sandbox,
    pub(super) standin: StandIn,
    pub(super) standin_ref: ProcessRef,
    /// Its VM is for nobody else, and has nothing to do when its process has ended.
    pub(super) ends_machine: bool,
    pub(super) undo: Undo,
    // Behind `undo`: who is interrupted cleans up first.
    pub(super) interrupt: Interrupt,
}

impl Created {
    /// Lets the container outlive this process.
    ///
    /// # Errors
    /// When its processes have ended meanwhile, or this one was interrupted.
    pub fn keep(self) -> Result<(), Error> {
        self.check_interrupted()?;
        self.keep_attached().map(drop)
    }

    /// # Errors
    /// When a signal asked this process to give up.
    pub fn check_interrupted(&self) -> Result<(), Error> {
        match self.interrupt.has_come() {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    /// Lets the container outlive this process, even when a signal has come: once
    /// the program runs, the signals are meant for it. A stand-in with a terminal
    /// ends its use of this process's terminal when the value is dropped.
    ///
    /// # Errors
    /// When its processes have ended meanwhile.
    pub fn keep_attached(self) -> Result<StandIn, Error> {
        let last = match self.ends_machine {
            true => self
                .standin_ref
                .pidfd()
                .map_err(context("the stand-in's descriptor"))?,
            false => None,
        };
        self.sandbox.commit(last.as_ref().map(AsFd::as_fd))?;
        self.standin.commit()?;
        self.undo.disarm();
        // What comes now comes too late: the container exists.
        self.interrupt.ignore();
        Ok(self.standin)
    }

    /// Gives the container its network; before its program starts.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn connect_network(&self) -> Result<(), Error> {
        network::connect(&self.sandbox, &self.record)
    }

    /// Runs the hooks that follow the start of the program.
    ///
    /// # Errors
    /// Of the first that fails; the container is to be dropped then.
    pub fn poststart(&self) -> Result<(), Error> {
        let state = hooks::State::of(&self.record, Status::Running);
        hooks::run(&self.record.hooks.poststart, &state, None, None).map_err(Error::Hook)
    }

    #[must_use]
    pub fn standin(&self) -> ProcessRef {
        self.standin_ref
    }

    /// Writes how far it got to the record.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn record_phase(&mut self, phase: Phase) -> Result<(), Error> {
        self.record.phase = phase;
        Ok(self.record.write(&self.root)?)
    }
}

/// Removes a half-made container when dropped.
pub(super) struct Undo {
    root: Root,
    id: String,
    pid_file: Option<PathBuf>,
    armed: bool,
    _lock: DirLock,
}

impl Undo {
    /// Of a container whose directory is locked.
    pub(super) fn new(root: &Root, id: &str, pid_file: Option<&Path>, lock: DirLock) -> Undo {
        Undo {
            root: root.clone(),
            id: id.to_owned(),
            pid_file: pid_file.map(Path::to_owned),
            armed: true,
            _lock: lock,
        }
    }

    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let Some(path) = &self.pid_file {
            // It may not have been written yet.
            let _ = fs::remove_file(path);
        }
        if let Err(e) = delete::destroy(&self.root, &self.id, Unreachable::IsLeftBehind) {
            log::warn!("cleaning up after a failed create: {e}");
        }
    }
}
