use super::*;
use serde_json::{Value, json};

struct Fixture {
    _dir: tempfile::TempDir,
    root: Root,
}

impl Fixture {
    fn new() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(Some(dir.path().to_owned()));
        root.create().unwrap();
        Fixture { _dir: dir, root }
    }

    /// A container in the VM of `sandbox`, which this process pretends to run.
    fn container(&self, id: &str, sandbox: &str, alive: bool) {
        let me = ProcessRef::current().unwrap();
        let gone = ProcessRef {
            start_time: u64::MAX,
            ..me
        };
        let mut record = ContainerRecord::new(id, sandbox, Path::new("/b")).unwrap();
        record.phase = super::super::state::Phase::Started;
        record.standin = Some(me);
        record.member_of = (id != sandbox).then_some(me);
        crate::root::create_private_dir(&self.root.container(id)).unwrap();
        record.write(&self.root).unwrap();
        if id == sandbox {
            let mut sandbox = SandboxRecord::new(id, 1, &[]).unwrap();
            sandbox.sandboxer = Some(if alive { me } else { gone });
            crate::root::create_private_dir(&self.root.sandbox(id)).unwrap();
            sandbox.write(&self.root).unwrap();
        }
    }

    fn resolve(&self, annotations: Value, namespaces: Value) -> Result<Membership, String> {
        let spec = json!({
            "ociVersion": "1.0.2",
            "annotations": annotations,
            "linux": {"namespaces": namespaces},
        });
        resolve(&self.root, "new", &serde_json::from_value(spec).unwrap())
            .map_err(|e| e.to_string())
    }
}

fn member_of(sandbox: &str) -> Value {
    json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": sandbox,
    })
}

#[test]
fn without_a_word_about_pods_the_vm_is_its_own() {
    let fixture = Fixture::new();
    fixture.container("pod", "pod", true);
    let namespaces = json!([{"type": "mount"}, {"type": "network", "path": ""}]);
    let found = fixture.resolve(json!({"a": "b"}), namespaces).unwrap();
    assert!(found.pod.is_none() && found.joins.is_empty() && found.host.is_empty());
    let sandbox = json!({
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": "new",
    });
    assert!(fixture.resolve(sandbox, json!([])).unwrap().pod.is_none());
}

#[test]
fn annotations_name_the_pod() {
    let fixture = Fixture::new();
    fixture.container("pod", "pod", true);
    fixture.container("member", "pod", true);
    let podman = json!({
        "io.kubernetes.cri-o.ContainerType": "container",
        "io.kubernetes.cri-o.SandboxID": "pod",
    });
    for annotations in [member_of("pod"), podman, member_of("member")] {
        let found = fixture.resolve(annotations, json!([])).unwrap();
        assert_eq!(found.pod.unwrap().sandbox_id, "pod");
        assert!(found.joins.is_empty());
    }
}

#[test]
fn annotations_that_name_no_living_pod_are_refused() {
    let fixture = Fixture::new();
    fixture.container("dead", "dead", false);
    for (annotations, words) in [
        (member_of("nobody"), "names nobody, which does not exist"),
        (member_of("../../etc"), "does not exist"),
        (member_of("new"), "does not exist"),
        (member_of(""), "names no sandbox"),
        (member_of("dead"), "the virtual machine of dead has ended"),
        (
            json!({"io.kubernetes.cri.container-type": "pause"}),
            "neither sandbox nor container",
        ),
    ] {
        let message = fixture.resolve(annotations, json!([])).unwrap_err();
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn members_of_a_pod_of_podman_that_shares_nothing_have_machines_of_their_own() {
    let fixture = Fixture::new();
    fixture.container("other", "other", true);
    let podman = json!({
        "io.kubernetes.cri-o.ContainerType": "container",
        "io.kubernetes.cri-o.SandboxID": "0123abcd",
    });
    let found = fixture.resolve(podman.clone(), json!([{"type": "ipc"}]));
    assert!(found.unwrap().pod.is_none());
    let namespaces = json!([{"type": "ipc", "path": "/proc/self/ns/ipc"}]);
    let message = fixture.resolve(podman, namespaces).unwrap_err();
    assert!(
        message.contains("names 0123abcd, which does not exist"),
        "{message}"
    );
}

/// This process is no stand-in, so only the namespaces that are found by what they
/// are can be its own; the others are found by the tests with real ones.
#[test]
fn a_namespace_of_a_stand_in_names_the_pod() {
    let fixture = Fixture::new();
    fixture.container("pod", "pod", true);
    for path in ["/proc/self/ns/ipc", "/proc/thread-self/ns/ipc"] {
        let namespaces = json!([{"type": "ipc", "path": path}]);
        let found = fixture.resolve(json!({}), namespaces).unwrap();
        assert_eq!(found.pod.unwrap().sandbox_id, "pod");
        assert_eq!(found.joins[&Kind::Ipc], "pod");
        assert!(found.host.contains_key(&Kind::Ipc));
    }
}

#[test]
fn annotation_and_path_must_agree() {
    let fixture = Fixture::new();
    fixture.container("pod", "pod", true);
    let namespaces = json!([{"type": "uts", "path": "/proc/self/ns/uts"}]);
    let found = fixture.resolve(member_of("pod"), namespaces.clone());
    assert_eq!(found.unwrap().joins[&Kind::Uts], "pod");
    let mut sandbox = member_of("new");
    sandbox["io.kubernetes.cri.container-type"] = json!("sandbox");
    let message = fixture.resolve(sandbox, namespaces).unwrap_err();
    assert!(
        message.contains("a sandbox has a virtual machine of its own"),
        "{message}"
    );
}

#[test]
fn namespaces_of_nobody_here_are_refused_but_for_the_network() {
    let fixture = Fixture::new();
    let path = |kind: &str| format!("/proc/self/ns/{kind}");
    for (kind, path, words) in [
        ("ipc", path("ipc"), "is not that of a container"),
        ("pid", path("pid"), "is not that of a container"),
        ("user", path("user"), "is not that of a container"),
        ("mount", path("mnt"), "joining the mount namespace"),
        ("network", path("net"), "the host's network"),
        ("uts", path("ipc"), "is not a uts namespace"),
        (
            "network",
            "/etc/passwd".into(),
            "is not a network namespace",
        ),
        (
            "pid",
            "/proc/0/ns/pid".into(),
            "lstat /proc/0/ns/pid: no such file",
        ),
    ] {
        let namespaces = json!([{"type": kind, "path": path}]);
        let message = fixture.resolve(json!({}), namespaces).unwrap_err();
        assert!(message.contains(words), "{kind}: {message}");
        assert!(message.contains(&path), "{kind}: {message}");
    }
}
