//! Commands for the same container at the same time: one wins, the others say why
//! they did not.

use std::thread;
use std::time::Duration;

use kuasar_runv_test_harness::{Container, Output, World};

fn at_once(number: usize, call: impl Fn(usize) -> Output + Sync) -> Vec<Output> {
    thread::scope(|scope| {
        let calls: Vec<_> = (0..number)
            .map(|n| {
                scope.spawn({
                    let call = &call;
                    move || call(n)
                })
            })
            .collect();
        calls.into_iter().map(|c| c.join().unwrap()).collect()
    })
}

#[test]
fn of_creates_with_the_same_id_exactly_one_wins() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 7");
    let path = bundle.path();
    let outcomes = at_once(4, |n| {
        let call = world.create_call(path, "c");
        let out = world.output_file(&format!("{n}.stdout"));
        let err = world.output_file(&format!("{n}.stderr"));
        call.output_to(out, err).output()
    });
    let winners = outcomes.iter().filter(|o| o.code() == 0).count();
    assert_eq!(winners, 1);
    for (n, _) in outcomes.iter().enumerate().filter(|(_, o)| o.code() != 0) {
        let said = std::fs::read_to_string(world.path(&format!("{n}.stderr"))).unwrap();
        assert!(
            said.contains("container with given ID already exists"),
            "{said}"
        );
    }
    let container = Container::adopt(&world, "c");
    container.start();
    assert_eq!(container.exit_code(), 7);
}

#[test]
fn of_starts_exactly_one_wins() {
    let world = World::new();
    let container = world.create(&world.bundle().sh("echo ran; sleep 1000"), "c");
    let outcomes = at_once(4, |_| container.command(&["start"]));
    let winners = outcomes.iter().filter(|o| o.code() == 0).count();
    assert_eq!(winners, 1);
    container.wait_for_output("ran\n");
    assert_eq!(container.stdout(), "ran\n");
}

/// podman's cleanup, `rm -f` and `stop` do not wait for each other.
#[test]
fn kills_and_deletes_do_not_disturb_each_other() {
    let world = World::new();
    let container = world.start(&world.bundle().sh("sleep 1000"), "c");
    let outcomes = at_once(6, |n| match n {
        0 => container.kill("KILL"),
        1 => world.call(["list"]).output(),
        _ => container.delete_force(),
    });
    for out in &outcomes[1..] {
        assert_eq!(out.code(), 0, "{}", out.stderr());
    }
    assert_eq!(container.exit_code(), 137);
    world.assert_clean();
}

/// The delete may come before, within or after the create: either way both answer, and
/// a second delete leaves nothing.
#[test]
fn delete_force_while_create_runs() {
    for moment in [0, 100, 300, 700] {
        let world = World::new();
        let bundle = world.bundle().sh("sleep 1000");
        let call = world.create_call(bundle.path(), "c");
        let files = (world.output_file("c.stdout"), world.output_file("c.stderr"));
        let create = call.output_to(files.0, files.1).spawn();
        thread::sleep(Duration::from_millis(moment));
        let delete = world.call(["delete", "--force", &world.id("c")]).output();
        let created = create.wait();
        // "Busy" is an answer; hanging or half a container is none.
        assert!([0, 1].contains(&delete.code()), "{}", delete.stderr());
        assert!([0, 1].contains(&created.code()));
        let _ = world
            .call(["delete", "--force", &world.id("c")])
            .output()
            .ok();
        world.assert_clean();
    }
}
