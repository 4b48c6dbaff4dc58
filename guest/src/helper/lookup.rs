//! Finding the program of a container: `exec.LookPath` of Go, whose rules and
//! words are runc's.
//!
//! Reference: Go's os/exec/lp_unix.go and runc 1.1, measured:
//! `exec: "x": executable file not found in $PATH`,
//! `exec: "/x": stat /x: no such file or directory`,
//! `exec: "/x": permission denied`.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use kuasar_runv_protocol::words::words;
use nix::errno::Errno;

/// Finds the program `name` as seen from the current directory; `path` is the
/// value of `PATH` in the process's environment.
///
/// # Errors
/// runc's message.
pub fn look_path(name: &str, path: &str) -> Result<String, String> {
    let failed = |why: &str| Err(format!("exec: \"{name}\": {why}"));
    if name.contains('/') {
        return match find_executable(name) {
            Ok(()) => Ok(name.to_owned()),
            Err(NotExecutable::Stat(e)) => failed(&format!("stat {name}: {}", words(&e))),
            Err(NotExecutable::Permission) => failed("permission denied"),
        };
    }
    for dir in path.split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        let candidate = format!("{}/{name}", dir.trim_end_matches('/'));
        if name.is_empty() || find_executable(&candidate).is_err() {
            continue;
        }
        if !candidate.starts_with('/') {
            return failed("cannot run executable found relative to current directory");
        }
        return Ok(candidate);
    }
    failed("executable file not found in $PATH")
}

enum NotExecutable {
    Stat(io::Error),
    Permission,
}

fn find_executable(file: &str) -> Result<(), NotExecutable> {
    let metadata = fs::metadata(Path::new(file)).map_err(NotExecutable::Stat)?;
    if metadata.is_dir() || metadata.permissions().mode() & 0o111 == 0 {
        return Err(NotExecutable::Permission);
    }
    let Ok(path) = CString::new(file) else {
        return Err(NotExecutable::Permission);
    };
    // SAFETY: the path is a C string. AT_EACCESS: with the identity and the
    // capabilities that the program will be executed with.
    let access =
        unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::X_OK, libc::AT_EACCESS) };
    // Anything but a refusal (a seccomp filter, an old kernel) is left to execve.
    if access < 0 && Errno::last() == Errno::EACCES {
        return Err(NotExecutable::Permission);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(std::path::PathBuf);

    impl Dir {
        fn new(name: &str) -> Dir {
            let dir = std::env::temp_dir().join(format!("lookup-{name}-{}", std::process::id()));
            drop(fs::remove_dir_all(&dir));
            fs::create_dir_all(dir.join("sub")).unwrap();
            for (file, mode) in [("prog", 0o755), ("data", 0o644)] {
                fs::write(dir.join(file), "").unwrap();
                fs::set_permissions(dir.join(file), fs::Permissions::from_mode(mode)).unwrap();
            }
            Dir(dir)
        }

        fn path(&self, file: &str) -> String {
            self.0.join(file).to_str().unwrap().to_owned()
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    #[test]
    fn names_with_a_slash_are_not_searched() {
        let dir = Dir::new("slash");
        let prog = dir.path("prog");
        assert_eq!(look_path(&prog, ""), Ok(prog));
        let (nope, data, sub) = (dir.path("nope"), dir.path("data"), dir.path("sub"));
        assert_eq!(
            look_path(&nope, ""),
            Err(format!(
                "exec: \"{nope}\": stat {nope}: no such file or directory"
            ))
        );
        for path in [data, sub] {
            assert_eq!(
                look_path(&path, ""),
                Err(format!("exec: \"{path}\": permission denied"))
            );
        }
        let below_file = dir.path("data/x");
        assert_eq!(
            look_path(&below_file, ""),
            Err(format!(
                "exec: \"{below_file}\": stat {below_file}: not a directory"
            ))
        );
    }

    #[test]
    fn path_is_searched_in_order_past_what_cannot_be_executed() {
        let dir = Dir::new("path");
        let path = format!("/nonexistent:{}/:/bin", dir.path(""));
        assert_eq!(look_path("prog", &path), Ok(dir.path("prog")));
        for name in ["data", "sub", "nope", ""] {
            assert_eq!(
                look_path(name, &path),
                Err(format!(
                    "exec: \"{name}\": executable file not found in $PATH"
                ))
            );
        }
    }
}
