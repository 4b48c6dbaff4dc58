//! The words of errors. Users and engines know runc's, which are Go's.

use std::io;

/// An error of the system in Go's words: lower case, and without its number.
#[must_use]
pub fn words(error: &io::Error) -> String {
    let text = error.to_string();
    let end = text.find(" (os error").unwrap_or(text.len());
    text[..end].to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_system_are_as_go_says_them() {
        let of = |errno| words(&io::Error::from_raw_os_error(errno));
        assert_eq!(of(libc::ENOENT), "no such file or directory");
        assert_eq!(of(libc::EACCES), "permission denied");
        assert_eq!(of(libc::ELOOP), "too many levels of symbolic links");
    }
}
