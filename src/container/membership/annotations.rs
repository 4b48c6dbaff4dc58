//! What engines say about pods in annotations.

use std::collections::HashMap;

use super::Error;

/// How one family of engines names what it says: the kind of container, and the
/// container that is the pod's sandbox.
struct Family {
    type_annotation: &'static str,
    id_annotation: &'static str,
    may_name_no_container: bool,
}

const FAMILIES: [Family; 2] = [
    // containerd's CRI plugin.
    Family {
        type_annotation: "io.kubernetes.cri.container-type",
        id_annotation: "io.kubernetes.cri.sandbox-id",
        may_name_no_container: false,
    },
    // CRI-O, and podman for the members of its pods. A pod of podman that shares
    // nothing (`--share ''`) has no container of its own: its members name the pod.
    Family {
        type_annotation: "io.kubernetes.cri-o.ContainerType",
        id_annotation: "io.kubernetes.cri-o.SandboxID",
        may_name_no_container: true,
    },
];

/// What the annotations say.
#[derive(Debug, PartialEq, Eq)]
pub struct Named<'a> {
    pub type_annotation: &'static str,
    pub id_annotation: &'static str,
    /// It is the first of a pod.
    pub is_sandbox: bool,
    /// The id of the pod's sandbox; of a sandbox it may be empty.
    pub sandbox: &'a str,
    /// A container that joins nobody's namespaces may name what is no container.
    pub may_name_no_container: bool,
}

/// Reads the annotations of the first family that says anything.
///
/// # Errors
/// [`Error::UnknownType`], [`Error::NoSandbox`].
pub fn read(annotations: Option<&HashMap<String, String>>) -> Result<Option<Named<'_>>, Error> {
    let get = |key: &str| annotations.and_then(|map| map.get(key)).map(String::as_str);
    for family in FAMILIES {
        let Family {
            type_annotation,
            id_annotation,
            may_name_no_container,
        } = family;
        let Some(kind) = get(type_annotation) else {
            continue;
        };
        let sandbox = get(id_annotation).unwrap_or_default();
        let is_sandbox = match kind {
            "sandbox" => true,
            "container" if sandbox.is_empty() => {
                return Err(Error::NoSandbox {
                    type_annotation,
                    id_annotation,
                });
            }
            "container" => false,
            other => {
                return Err(Error::UnknownType {
                    annotation: type_annotation,
                    value: other.to_owned(),
                });
            }
        };
        return Ok(Some(Named {
            type_annotation,
            id_annotation,
            is_sandbox,
            sandbox,
            may_name_no_container,
        }));
    }
    Ok(None)
}
