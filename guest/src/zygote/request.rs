//! What a helper can be asked to do, and its encoding.
//!
//! Both ends are the same executable, so the encoding only has to be small: the
//! first request of a machine pays for translating every line of it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A helper's one operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    Create(CreateRequest),
    Exec(ExecRequest),
}

/// Create one container. The descriptors that follow are the announced streams, the
/// namespaces it joins, and the preserved ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateRequest {
    pub container_id: String,
    /// Private directory of the container, with `SPEC_FILE` in it.
    pub dir: PathBuf,
    /// Which of stdin, stdout and stderr follow as descriptors.
    pub stdio: [bool; 3],
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    /// See `plain_newlines` of agent.proto.
    pub plain_newlines: bool,
    /// How many descriptors it gets besides stdio.
    pub preserved: u8,
    /// Kinds of the namespaces it joins, as [`Kind::bit`]s; the descriptors come in
    /// the order of [`Kind::ALL`].
    ///
    /// [`Kind::bit`]: kuasar_runv_protocol::namespace::Kind::bit
    /// [`Kind::ALL`]: kuasar_runv_protocol::namespace::Kind::ALL
    pub joins: u8,
}

/// Start one more process in a container. The descriptors that follow are the
/// process's part of a config.json, a pidfd of the container's process, the announced
/// streams, and the preserved descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    pub container_id: String,
    /// Private directory of the container.
    pub dir: PathBuf,
    pub stdio: [bool; 3],
    pub no_new_keyring: bool,
    pub plain_newlines: bool,
    pub preserved: u8,
    /// The cgroup is frozen: the process enters it when all the rest is done.
    pub late_cgroup: bool,
    /// Directory of the process's cgroup.
    pub cgroup: PathBuf,
    pub umask: u32,
    /// The container's process.
    pub init_pid: i32,
}

const NO_PIVOT: u8 = 1 << 3;
const NO_NEW_KEYRING: u8 = 1 << 4;
const LATE_CGROUP: u8 = 1 << 5;
const PLAIN_NEWLINES: u8 = 1 << 6;
const EXEC: u8 = 1 << 7;

/// Bytes of the two numbers of an [`ExecRequest`].
const NUMBERS: usize = 8;

impl Request {
    /// How many of the descriptors that come with it, the last ones, are preserved.
    #[must_use]
    pub fn preserved(&self) -> u8 {
        match self {
            Request::Create(request) => request.preserved,
            Request::Exec(request) => request.preserved,
        }
    }

    /// A byte of flags, the number of preserved descriptors, the joined kinds or the
    /// numbers, then the strings, separated by a NUL that none of them can have.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Request::Create(r) => {
                let mut flags = stdio_bits(r.stdio);
                set(&mut flags, NO_PIVOT, r.no_pivot);
                set(&mut flags, NO_NEW_KEYRING, r.no_new_keyring);
                set(&mut flags, PLAIN_NEWLINES, r.plain_newlines);
                let mut bytes = vec![flags, r.preserved, r.joins];
                push_strings(&mut bytes, &r.container_id, &r.dir, None);
                bytes
            }
            Request::Exec(r) => {
                let mut flags = stdio_bits(r.stdio) | EXEC;
                set(&mut flags, NO_NEW_KEYRING, r.no_new_keyring);
                set(&mut flags, LATE_CGROUP, r.late_cgroup);
                set(&mut flags, PLAIN_NEWLINES, r.plain_newlines);
                let mut bytes = vec![flags, r.preserved];
                bytes.extend_from_slice(&r.umask.to_le_bytes());
                bytes.extend_from_slice(&r.init_pid.to_le_bytes());
                push_strings(&mut bytes, &r.container_id, &r.dir, Some(&r.cgroup));
                bytes
            }
        }
    }

    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Request> {
        let (&[flags, preserved], rest) = bytes.split_first_chunk()?;
        let stdio = [flags & 1 != 0, flags & 2 != 0, flags & 4 != 0];
        let no_new_keyring = flags & NO_NEW_KEYRING != 0;
        let plain_newlines = flags & PLAIN_NEWLINES != 0;
        if flags & EXEC == 0 {
            let (&joins, strings) = rest.split_first()?;
            let (container_id, dir) = cut(strings)?;
            return Some(Request::Create(CreateRequest {
                container_id: String::from_utf8(container_id.to_vec()).ok()?,
                dir: path(dir),
                stdio,
                no_pivot: flags & NO_PIVOT != 0,
                no_new_keyring,
                plain_newlines,
                preserved,
                joins,
            }));
        }
        let (numbers, strings) = rest.split_at_checked(NUMBERS)?;
        let (umask, init_pid) = numbers.split_at(NUMBERS / 2);
        let (container_id, strings) = cut(strings)?;
        let (dir, cgroup) = cut(strings)?;
        Some(Request::Exec(ExecRequest {
            container_id: String::from_utf8(container_id.to_vec()).ok()?,
            dir: path(dir),
            stdio,
            no_new_keyring,
            plain_newlines,
            preserved,
            late_cgroup: flags & LATE_CGROUP != 0,
            cgroup: path(cgroup),
            umask: u32::from_le_bytes(umask.try_into().ok()?),
            init_pid: i32::from_le_bytes(init_pid.try_into().ok()?),
        }))
    }
}

fn set(flags: &mut u8, bit: u8, is_set: bool) {
    if is_set {
        *flags |= bit;
    }
}

fn stdio_bits(stdio: [bool; 3]) -> u8 {
    let mut flags = 0;
    for (bit, announced) in stdio.into_iter().enumerate() {
        flags |= u8::from(announced) << bit;
    }
    flags
}

fn push_strings(bytes: &mut Vec<u8>, id: &str, dir: &Path, cgroup: Option<&Path>) {
    bytes.extend_from_slice(id.as_bytes());
    for path in [Some(dir), cgroup].into_iter().flatten() {
        bytes.push(0);
        bytes.extend_from_slice(path.as_os_str().as_bytes());
    }
}

fn cut(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|&b| b == 0)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

fn path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_round_trip() {
        for bits in 0..128 {
            let stdio = [bits & 1 != 0, bits & 2 != 0, bits & 4 != 0];
            let create = Request::Create(CreateRequest {
                container_id: "c-1".into(),
                dir: "/run/x/1".into(),
                stdio,
                no_pivot: bits & 8 != 0,
                no_new_keyring: bits & 16 != 0,
                plain_newlines: bits & 64 != 0,
                preserved: bits & 63,
                joins: bits,
            });
            let exec = Request::Exec(ExecRequest {
                container_id: "c-1".into(),
                dir: "/run/x/1".into(),
                stdio,
                no_new_keyring: bits & 8 != 0,
                plain_newlines: bits & 64 != 0,
                preserved: bits & 63,
                late_cgroup: bits & 16 != 0,
                cgroup: "/sys/fs/cgroup/kuasar-c-1/sub".into(),
                umask: 0o22,
                init_pid: 4711,
            });
            for request in [create, exec] {
                assert_eq!(Request::decode(&request.encode()), Some(request));
            }
        }
        for bytes in [
            &b""[..],
            b"\0",
            b"\0\0\0no end",
            &[EXEC],
            &[EXEC, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(Request::decode(bytes), None);
        }
    }
}
