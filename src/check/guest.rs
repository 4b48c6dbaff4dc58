//! Kernel and image of the guest: there, readable, and of a kind that boots.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Finding, Subject};
use crate::vm::{self, requirements};

pub(super) fn kernel(subject: &Subject) -> Finding {
    const NAME: &str = "guest kernel";
    let path = &subject.config.guest.kernel;
    match requirements::kernel(path) {
        Ok(file) => match kernel_kind(&file) {
            Some(kind) => Finding::ok(NAME, describe(path, &file, kind)),
            None => Finding::fail(
                NAME,
                format!("{} is neither an ELF kernel nor a bzImage", path.display()),
                "build it with `make kernel`, or set guest.kernel in config.toml",
            ),
        },
        Err(e) => unusable(NAME, &e),
    }
}

pub(super) fn image(subject: &Subject) -> Finding {
    const NAME: &str = "guest image";
    let path = &subject.config.guest.image;
    match requirements::image(path) {
        Ok(file) => match image_kind(&file) {
            Some(kind) => Finding::ok(NAME, describe(path, &file, kind)),
            None => Finding::fail(
                NAME,
                format!("{} is no initramfs", path.display()),
                "build it with `make image`, or set guest.image in config.toml",
            ),
        },
        Err(e) => unusable(NAME, &e),
    }
}

/// What the hypervisor would say, with its own advice.
pub(super) fn unusable(name: &'static str, error: &vm::Error) -> Finding {
    let remedy = match error {
        vm::Error::File { hint, .. } => (*hint).to_owned(),
        _ => "see the message".to_owned(),
    };
    let text = error.to_string();
    // The advice has a place of its own.
    let text = text.strip_suffix(&format!(" ({remedy})")).unwrap_or(&text);
    Finding::fail(name, text, remedy)
}

fn describe(path: &Path, file: &File, kind: &str) -> String {
    let size = file.metadata().map(|m| m.len()).unwrap_or_default();
    format!("{} ({kind}, {} KiB)", path.display(), size / 1024)
}

fn kernel_kind(file: &File) -> Option<&'static str> {
    if starts_with(file, 0, b"\x7fELF") {
        Some("ELF")
    } else if starts_with(file, 0x202, b"HdrS") {
        // Documentation/arch/x86/boot.rst of Linux.
        Some("bzImage")
    } else {
        None
    }
}

/// What the kernel can unpack (Documentation/driver-api/early-userspace of Linux).
fn image_kind(file: &File) -> Option<&'static str> {
    const KINDS: [(&[u8], &str); 6] = [
        (b"07070", "cpio"),
        (b"\x1f\x8b", "cpio, gzip"),
        (b"\x28\xb5\x2f\xfd", "cpio, zstd"),
        (b"\xfd7zXZ", "cpio, xz"),
        (b"\x02\x21\x4c\x18", "cpio, lz4"),
        (b"BZh", "cpio, bzip2"),
    ];
    KINDS
        .iter()
        .find(|(magic, _)| starts_with(file, 0, magic))
        .map(|(_, kind)| *kind)
}

fn starts_with(file: &File, offset: u64, magic: &[u8]) -> bool {
    let mut bytes = [0; 8];
    let bytes = &mut bytes[..magic.len()];
    file.read_exact_at(bytes, offset).is_ok() && bytes == magic
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;
    use crate::config::Config;
    use crate::root::Root;

    fn findings(content: &[u8]) -> [Finding; 2] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, content).unwrap();
        let mut config = Config::default();
        config.guest.kernel.clone_from(&path);
        config.guest.image = path;
        let root = Root::new(None);
        let subject = Subject { root, config };
        [kernel(&subject), image(&subject)]
    }

    #[test]
    fn a_file_of_another_kind_is_not_taken_for_a_guest() {
        let [kernel, image] = findings(b"\x7fELF and so on");
        assert_eq!((kernel.level, image.level), (Level::Ok, Level::Fail));
        let [kernel, image] = findings(b"070701 and so on");
        assert_eq!((kernel.level, image.level), (Level::Fail, Level::Ok));
        let [kernel, image] = findings(b"");
        assert_eq!((kernel.level, image.level), (Level::Fail, Level::Fail));
    }

    #[test]
    fn a_missing_file_comes_with_the_hypervisors_advice() {
        let mut config = Config::default();
        config.guest.kernel = "/no/such/kernel".into();
        let root = Root::new(None);
        let finding = kernel(&Subject { root, config });
        assert_eq!(
            finding.text,
            "cannot use the guest kernel /no/such/kernel: it does not exist"
        );
        assert!(finding.remedy.unwrap().contains("make install"));
    }
}
