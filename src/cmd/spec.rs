//! `kuasar-runv spec`

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;

use super::{Context, Failure};

/// The same container that `runc spec` describes, in the order people read it.
const CONFIG: &str = include_str!("spec/config.json");

/// What is different for a user without privileges: text of [`CONFIG`], and what
/// is there instead.
///
/// As with runc, root in the container is the caller, who has no other ids to
/// give and no limits to set. Unlike with runc there is a network namespace (the
/// host's network cannot be used from a virtual machine), and so a sysfs of the
/// container's own.
const ROOTLESS: [(&str, &str); 3] = [
    (",\n\t\t\t\t\"gid=5\"", ""),
    (RESOURCES, MAPPINGS),
    (
        "\t\t\t{\n\t\t\t\t\"type\": \"mount\"\n\t\t\t}\n",
        "\t\t\t{\n\t\t\t\t\"type\": \"mount\"\n\t\t\t},\n\t\t\t{\n\t\t\t\t\"type\": \"user\"\n\t\t\t}\n",
    ),
];

const RESOURCES: &str = "\t\t\"resources\": {
\t\t\t\"devices\": [
\t\t\t\t{
\t\t\t\t\t\"allow\": false,
\t\t\t\t\t\"access\": \"rwm\"
\t\t\t\t}
\t\t\t]
\t\t},
";

const MAPPINGS: &str = "\t\t\"uidMappings\": [
\t\t\t{
\t\t\t\t\"containerID\": 0,
\t\t\t\t\"hostID\": UID,
\t\t\t\t\"size\": 1
\t\t\t}
\t\t],
\t\t\"gidMappings\": [
\t\t\t{
\t\t\t\t\"containerID\": 0,
\t\t\t\t\"hostID\": GID,
\t\t\t\t\"size\": 1
\t\t\t}
\t\t],
";

/// Create a config.json to start from
///
/// It runs `sh` in a terminal, with the rootfs in the directory `rootfs` of the
/// bundle. Edit it to run something else.
#[derive(clap::Args)]
#[command(after_help = "Example: busybox from a container image\n    \
    mkdir -p mybundle/rootfs\n    \
    podman export $(podman create busybox) | tar -C mybundle/rootfs -xf -\n    \
    kuasar-runv spec --bundle mybundle\n    \
    kuasar-runv run --bundle mybundle mycontainer")]
pub struct Args {
    /// Directory of the bundle [default: the current directory]
    #[arg(long, short, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Make it for a container that is started without root privileges
    #[arg(long)]
    rootless: bool,
}

pub fn run(_: &Context, args: &Args) -> Result<u8, Failure> {
    let dir = args.bundle.clone().unwrap_or_default();
    let path = dir.join("config.json");
    let text = if args.rootless {
        rootless(
            nix::unistd::geteuid().as_raw(),
            nix::unistd::getegid().as_raw(),
        )
    } else {
        CONFIG.to_owned()
    };
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => {
                io::Error::other("File config.json exists. Remove it first")
            }
            _ => io::Error::new(e.kind(), format!("{}: {e}", path.display())),
        })?;
    file.write_all(text.as_bytes())?;
    Ok(0)
}

fn rootless(uid: u32, gid: u32) -> String {
    ROOTLESS
        .iter()
        .fold(CONFIG.to_owned(), |text, (there, instead)| {
            text.replace(there, instead)
        })
        .replace("UID", &uid.to_string())
        .replace("GID", &gid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::OCI_VERSION;
    use oci_spec::runtime::{LinuxNamespaceType, Spec};

    #[test]
    fn both_are_configurations_of_this_version() {
        for text in [CONFIG.to_owned(), rootless(1000, 1001)] {
            let spec: Spec = serde_json::from_str(&text).unwrap();
            assert_eq!(spec.version(), OCI_VERSION);
        }
    }

    #[test]
    fn without_privileges_there_is_a_user_namespace_and_no_limit() {
        for (there, _) in ROOTLESS {
            assert_eq!(CONFIG.matches(there).count(), 1, "{there:?}");
        }
        let spec: Spec = serde_json::from_str(&rootless(1000, 1001)).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.resources().is_none());
        assert_eq!(linux.uid_mappings().as_ref().unwrap()[0].host_id(), 1000);
        assert_eq!(linux.gid_mappings().as_ref().unwrap()[0].host_id(), 1001);
        let namespaces = linux.namespaces().as_ref().unwrap();
        let user = |n: &oci_spec::runtime::LinuxNamespace| n.typ() == LinuxNamespaceType::User;
        assert!(namespaces.iter().any(user));
    }
}
