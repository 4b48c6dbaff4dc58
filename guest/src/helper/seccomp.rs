//! The system call filter of a container's processes, which the host has compiled.
//!
//! libcontainer knows nothing of it. Loading a filter is a privilege unless the process
//! has `no_new_privs`, so without that the capabilities are not left to libcontainer
//! either: they are dropped here, after the filter is loaded.

use std::fs;
use std::io;
use std::path::Path;

use kuasar_runv_protocol::seccomp::{Filter, INSTRUCTION};
use kuasar_runv_protocol::words::words;
use libcontainer::capabilities::{drop_privileges, reset_effective};
use libcontainer::syscall::syscall::create_syscall;
use oci_spec::runtime::{LinuxCapabilities, Spec};

use super::SECCOMP_FILE;
use super::failure::{Failure, chain};
use crate::sys;

/// The filter of a container with this private directory.
///
/// # Errors
/// When it cannot be read, or is none.
pub fn read(dir: &Path) -> Result<Option<Filter>, Failure> {
    match fs::read(dir.join(SECCOMP_FILE)) {
        Ok(bytes) => Filter::decode(&bytes)
            .map(Some)
            .ok_or_else(|| Failure::invalid("unable to init seccomp: it is not a filter")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::io("reading the system call filter")(e)),
    }
}

/// Puts this process and those it forks under the filter.
///
/// # Errors
/// runc's message.
pub fn load(filter: &Filter) -> Result<(), String> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.program.len() / INSTRUCTION)
            .map_err(|_| "unable to init seccomp: the filter is too long".to_owned())?,
        // Only read, and copied byte by byte.
        filter: filter.program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the program has as many instructions as it says.
    let loaded = sys::check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            filter.flags,
            &raw const program,
        )
    });
    loaded.map(drop).map_err(|e| {
        format!(
            "unable to init seccomp: error loading seccomp filter: {}",
            words(&e)
        )
    })
}

/// What the process of a container does to itself just before its program is looked up.
#[derive(Clone)]
pub struct Confinement {
    filter: Filter,
    /// Those it keeps, if they are not dropped yet.
    capabilities: Option<LinuxCapabilities>,
}

impl Confinement {
    /// Takes from libcontainer what has to come after the filter.
    ///
    /// # Errors
    /// As [`read`].
    pub fn take(spec: &mut Spec, dir: &Path) -> Result<Option<Confinement>, Failure> {
        let Some(filter) = read(dir)? else {
            return Ok(None);
        };
        let capabilities = match spec.process_mut() {
            Some(process) if process.no_new_privileges().is_none() => {
                let capabilities = process.capabilities().clone();
                process.set_capabilities(None);
                capabilities
            }
            _ => None,
        };
        Ok(Some(Confinement {
            filter,
            capabilities,
        }))
    }

    /// # Errors
    /// runc's message.
    pub fn apply(&self) -> Result<(), String> {
        load(&self.filter)?;
        let Some(capabilities) = &self.capabilities else {
            return Ok(());
        };
        let syscall = create_syscall();
        reset_effective(syscall.as_ref())
            .and_then(|()| drop_privileges(capabilities, syscall.as_ref()))
            .map_err(|e| format!("unable to apply caps: {}", chain(&e)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kuasar_runv_protocol::seccomp::FLAG_LOG;

    fn spec(no_new_privileges: Option<bool>) -> Spec {
        let mut spec = Spec::default();
        let process = spec.process_mut().as_mut().unwrap();
        process.set_no_new_privileges(no_new_privileges);
        process.set_capabilities(Some(LinuxCapabilities::default()));
        spec
    }

    #[test]
    fn capabilities_stay_libcontainers_where_they_can_go_first() {
        let dir = tempdir("first");
        fs::write(dir.join(SECCOMP_FILE), any().encode()).unwrap();
        for (no_new_privileges, ours) in [(None, true), (Some(true), false)] {
            let mut spec = spec(no_new_privileges);
            let taken = Confinement::take(&mut spec, &dir).unwrap().unwrap();
            let left = spec.process().as_ref().unwrap().capabilities().is_some();
            assert_eq!((taken.capabilities.is_some(), left), (ours, !ours));
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn without_a_filter_nothing_is_taken() {
        let dir = tempdir("none");
        let mut spec = spec(None);
        assert!(Confinement::take(&mut spec, &dir).unwrap().is_none());
        assert!(spec.process().as_ref().unwrap().capabilities().is_some());
        fs::write(dir.join(SECCOMP_FILE), b"torn").unwrap();
        assert!(Confinement::take(&mut spec, &dir).is_err());
        fs::remove_dir_all(dir).unwrap();
    }

    fn any() -> Filter {
        Filter {
            flags: FLAG_LOG,
            program: vec![6; INSTRUCTION],
        }
    }

    fn tempdir(name: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("runv-seccomp-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }
}
