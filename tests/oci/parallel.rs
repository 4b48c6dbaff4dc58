//! Many containers at once.

use std::thread;

use kuasar_runv_test_harness::World;

#[test]
fn twenty_containers_are_created_and_run_in_parallel() {
    const CONTAINERS: i32 = 20;
    let world = World::new();
    let bundles: Vec<_> = (0..CONTAINERS)
        .map(|n| {
            world
                .bundle()
                .sh(&format!("echo container {n}; sleep 0.2; exit {n}"))
        })
        .collect();
    thread::scope(|scope| {
        for (n, bundle) in (0..).zip(&bundles) {
            let world = &world;
            scope.spawn(move || {
                let container = world.create(bundle, &format!("c{n}"));
                assert_eq!(container.status(), "created");
                container.start();
                assert_eq!(container.exit_code(), n);
                assert_eq!(container.stdout(), format!("container {n}\n"));
                let _ = container.delete().ok();
            });
        }
    });
    world.assert_clean();
}
