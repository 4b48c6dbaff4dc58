//! Kills for lack of memory, as engines learn of them.

use kuasar_runv_test_harness::cgroup::{self, OomListener};
use kuasar_runv_test_harness::{Bundle, World, json};

/// Of a container without a child that takes more.
const LIMIT: u64 = 48 << 20;

fn limited(bundle: Bundle) -> Bundle {
    bundle.with(|c| c["linux"]["resources"]["memory"] = json!({ "limit": LIMIT }))
}

/// When an engine sees the end of the container, it has been notified.
#[test]
fn the_cgroup_of_the_container_reports_kills_before_its_end() {
    let world = World::new();
    let bundles = [
        ("own", world.bundle().probe("memory 200"), 137),
        // It survives the death of its child.
        ("child", world.bundle().sh("tail /dev/zero; exit 3"), 3),
        ("innocent", world.bundle().sh("exit 137"), 137),
    ];
    for (name, bundle, code) in bundles {
        let container = world.create(&limited(bundle), name);
        let listener = OomListener::new(container.pid);
        let limit = cgroup::file(
            container.pid,
            "memory",
            ["memory.limit_in_bytes", "memory.max"],
        );
        let limit = || std::fs::read_to_string(limit.as_ref().unwrap()).unwrap();
        let before = limit();
        assert_eq!(listener.kills(), 0);
        container.start();
        assert_eq!(container.exit_code(), code, "{name}");
        assert_eq!(listener.was_notified(), name != "innocent", "{name}");
        assert_eq!(listener.kills(), u64::from(name != "innocent"), "{name}");
        assert_eq!(limit(), before);
        let _ = container.delete().ok();
    }
    world.assert_clean();
}
