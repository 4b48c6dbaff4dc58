//! The home directory of a user, from the text of a passwd(5) file.
//!
//! Not `getpwuid`: in a container its answer comes from libraries that the
//! container chose (nsswitch.conf), loaded into a process that is not confined
//! yet.

use std::fs::File;
use std::io::Read;

/// Longest passwd file that is read, in bytes.
const MAX_PASSWD: u64 = 1024 * 1024;
/// runc's answer when the file has none.
pub const DEFAULT_HOME: &str = "/";

/// Home of `uid` by the `/etc/passwd` of the current root.
#[must_use]
pub fn home_of(uid: u32) -> String {
    let mut text = Vec::new();
    let read = File::open("/etc/passwd")
        // A fifo or a device in its place must not hold the container up.
        .and_then(|file| match file.metadata()?.is_file() {
            true => file.take(MAX_PASSWD).read_to_end(&mut text),
            false => Ok(0),
        });
    match read {
        Ok(_) => home_in(&text, uid).unwrap_or_else(|| DEFAULT_HOME.to_owned()),
        Err(_) => DEFAULT_HOME.to_owned(),
    }
}

pub(crate) fn home_in(passwd: &[u8], uid: u32) -> Option<String> {
    passwd.split(|&b| b == b'\n').find_map(|line| {
        // name:password:uid:gid:gecos:home:shell
        let mut fields = line.split(|&b| b == b':');
        let id = std::str::from_utf8(fields.nth(2)?).ok()?;
        if id.trim().parse() != Ok(uid) {
            return None;
        }
        let home = std::str::from_utf8(fields.nth(2)?).ok()?;
        (!home.is_empty()).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_entry_of_the_uid_counts() {
        let passwd =
            b"#comment\nroot:x:0:0:root:/root:/bin/sh\nbroken\nu:x:7:7::/home/u:\nv:x:7:7::/v:";
        assert_eq!(home_in(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_in(passwd, 7).as_deref(), Some("/home/u"));
        assert_eq!(home_in(passwd, 8), None);
    }

    #[test]
    fn an_entry_without_a_home_is_none() {
        assert_eq!(home_in(b"u:x:7:7:::", 7), None);
        assert_eq!(home_in(b"u:x:7:7", 7), None);
        assert_eq!(home_in(b"\xff:x:7:7::\xff:", 7), None);
    }
}
