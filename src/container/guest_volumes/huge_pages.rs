//! Huge pages: a mount of type `hugetlbfs`, or a bind mount of one of the host
//! (which is how Kubernetes hands `medium: HugePages` on). Huge pages of the host
//! cannot be mapped by the guest, so they are the guest's own.

use std::path::Path;

use kuasar_runv_protocol::storage;
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{FsWord, statfs};

use super::super::guest_spec::Error;
use super::super::mount_options;

const HUGETLBFS_MAGIC: FsWord = 0x9584_58f6;
const DEFAULT_PAGE_SIZE: u64 = 2 << 20;

/// Huge pages that a container uses.
#[derive(Debug, PartialEq, Eq)]
pub struct HugePages {
    /// Names them among the pod's volumes.
    pub key: String,
    /// Bytes.
    page_size: u64,
    size: u64,
}

impl HugePages {
    #[must_use]
    pub fn request(&self) -> storage::HugePages {
        storage::HugePages {
            page_size: self.page_size,
            size: self.size,
            ..storage::HugePages::new()
        }
    }
}

/// The huge pages that a bind mount of `source` stands for, if it is of huge pages.
/// `key` names the source.
///
/// # Errors
/// [`Error::Unsupported`] when nothing says how many.
pub fn of_bind(source: &Path, key: &str, spec: &Spec) -> Result<Option<HugePages>, Error> {
    let Ok(found) = statfs(source) else {
        return Ok(None);
    };
    if found.f_type != HUGETLBFS_MAGIC {
        return Ok(None);
    }
    let page_size = u64::try_from(found.f_bsize).unwrap_or(DEFAULT_PAGE_SIZE);
    // Without a limit of its own it has all ones, or nothing.
    let own = found
        .f_blocks
        .checked_mul(page_size)
        .filter(|bytes| *bytes > 0);
    let own = own.filter(|bytes| i64::try_from(*bytes).is_ok());
    let pages = with_size(key, page_size, limit(spec, page_size).or(own), source)?;
    Ok(Some(pages))
}

/// The huge pages of a mount of type hugetlbfs, and the options of the bind mount
/// that the container makes of them.
///
/// # Errors
/// [`Error::Unsupported`] for other options, or when nothing says how many pages.
pub fn of_mount(mount: &Mount, key: &str, spec: &Spec) -> Result<(HugePages, Vec<String>), Error> {
    let (mut page_size, mut size) = (DEFAULT_PAGE_SIZE, None);
    let mut options = vec!["bind".to_owned()];
    let at = mount.destination();
    for option in mount.options().iter().flatten() {
        let bytes = |text: &str| {
            parse_size(text).ok_or_else(|| {
                let at = at.display();
                Error::Unsupported(format!(
                    "the mount on {at} has {option:?}, which is no size"
                ))
            })
        };
        match option.split_once('=') {
            Some(("pagesize", text)) => page_size = bytes(text)?,
            Some(("size", text)) => size = Some(bytes(text)?),
            None if mount_options::KNOWN.binary_search(&option.as_str()).is_ok() => {
                options.push(option.clone());
            }
            _ => {
                return Err(Error::Unsupported(format!(
                    "the option {option:?} of the mount on {} is not supported: huge pages have pagesize= and size=",
                    at.display()
                )));
            }
        }
    }
    let pages = with_size(key, page_size, size.or(limit(spec, page_size)), at)?;
    Ok((pages, options))
}

fn with_size(
    key: &str,
    page_size: u64,
    size: Option<u64>,
    path: &Path,
) -> Result<HugePages, Error> {
    let size = size.ok_or_else(|| {
        Error::Unsupported(format!(
            "nothing says how many huge pages {} has: set linux.resources.hugepageLimits",
            path.display()
        ))
    })?;
    Ok(HugePages {
        key: key.to_owned(),
        page_size,
        size,
    })
}

/// The container's limit of pages of this size, in bytes.
fn limit(spec: &Spec, page_size: u64) -> Option<u64> {
    let resources = spec.linux().as_ref()?.resources().as_ref()?;
    let limits = resources.hugepage_limits().iter().flatten();
    let bytes = limits
        .filter(|limit| parse_size(limit.page_size()) == Some(page_size))
        .find_map(|limit| u64::try_from(limit.limit()).ok())?;
    Some(bytes).filter(|bytes| *bytes > 0)
}

/// `2M`, `2MB`, `1G`, `2097152`.
fn parse_size(text: &str) -> Option<u64> {
    let text = text.strip_suffix(['B', 'b']).unwrap_or(text);
    let (digits, shift) = match text.char_indices().last()? {
        (at, 'k' | 'K') => (&text[..at], 10),
        (at, 'm' | 'M') => (&text[..at], 20),
        (at, 'g' | 'G') => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().ok()?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(options: &[&str], limits: serde_json::Value) -> Result<(HugePages, Vec<String>), Error> {
        let spec =
            json!({"ociVersion": "1.0.2", "linux": {"resources": {"hugepageLimits": limits}}});
        let mount = json!({"destination": "/x", "type": "hugetlbfs", "options": options});
        let (spec, mount) = (spec.to_string(), mount.to_string());
        of_mount(
            &serde_json::from_str(&mount).unwrap(),
            "key",
            &serde_json::from_str(&spec).unwrap(),
        )
    }

    #[test]
    fn sizes_come_from_the_mount_or_the_limit() {
        let limits =
            json!([{"pageSize": "1GB", "limit": 1}, {"pageSize": "2MB", "limit": 8 << 20}]);
        let (pages, options) = of(&["nosuid", "size=4M"], limits.clone()).unwrap();
        assert_eq!((pages.page_size, pages.size), (2 << 20, 4 << 20));
        assert_eq!(options, ["bind", "nosuid"]);
        assert_eq!(
            of(&["pagesize=2M"], limits.clone()).unwrap().0.size,
            8 << 20
        );
        assert_eq!(of(&["pagesize=1G"], limits).unwrap().0.size, 1);
        for options in [
            &[][..],
            &["size=x"],
            &["size=-1"],
            &["bogus", "size=4M"],
            &["size=50%"],
        ] {
            assert!(of(options, json!([])).is_err(), "{options:?}");
        }
    }

    #[test]
    fn a_directory_of_another_file_system_is_none() {
        let spec = serde_json::from_value(json!({"ociVersion": "1.0.2"})).unwrap();
        assert_eq!(of_bind(Path::new("/proc"), "key", &spec).unwrap(), None);
    }
}
