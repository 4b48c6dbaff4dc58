//! Resource limits of the container's process.
//!
//! libcontainer would set them while it still needs descriptors and memory itself,
//! and a small limit made it fail in odd ways. So they are kept from it: the helper
//! raises the hard limits that have to be raised, which takes privileges, and the
//! process sets the limits as the last thing before it executes its program.

use std::io;

use oci_spec::runtime::{PosixRlimit, PosixRlimitType, Spec};

use super::failure::Failure;
use crate::sys;

/// Takes the limits out of the spec.
pub fn take(spec: &mut Spec) -> Vec<PosixRlimit> {
    let Some(process) = spec.process_mut() else {
        return Vec::new();
    };
    let limits = process.rlimits().clone().unwrap_or_default();
    process.set_rlimits(None);
    limits
}

/// Raises hard limits of the process `pid` to those that are wanted.
pub fn raise(pid: i32, limits: &[PosixRlimit]) -> Result<(), Failure> {
    for limit in limits {
        let failed = || Failure::io(format!("error setting rlimit {:?}", limit.typ()));
        let resource = resource(limit.typ());
        // What this process has is what that one has: it is a clone of it.
        let mut current = get(resource).map_err(failed())?;
        if limit.hard() > current.rlim_max {
            current.rlim_max = limit.hard();
            // SAFETY: the new limit is valid, the old one is not asked for.
            let set =
                unsafe { libc::prlimit(pid, resource, &raw const current, std::ptr::null_mut()) };
            sys::check(set.into()).map_err(failed())?;
        }
    }
    Ok(())
}

/// Sets the limits of this process.
///
/// # Errors
/// As setrlimit(2).
pub fn apply(limits: &[PosixRlimit]) -> io::Result<()> {
    for limit in limits {
        let wanted = libc::rlimit {
            rlim_cur: limit.soft(),
            rlim_max: limit.hard(),
        };
        // SAFETY: the limit is valid.
        sys::check(unsafe { libc::setrlimit(resource(limit.typ()), &raw const wanted) }.into())?;
    }
    Ok(())
}

fn get(resource: libc::__rlimit_resource_t) -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: getrlimit fills the limit in.
    sys::check(unsafe { libc::getrlimit(resource, &raw mut limit) }.into())?;
    Ok(limit)
}

fn resource(typ: PosixRlimitType) -> libc::__rlimit_resource_t {
    match typ {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}
