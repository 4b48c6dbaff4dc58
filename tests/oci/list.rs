//! `list`.

use kuasar_runv_test_harness::{Value, World};

#[test]
fn list_shows_the_same_containers_in_every_format() {
    let world = World::new();
    let created = world.create(&world.bundle().sh("exit 0"), "a");
    let stopped = world.start(&world.bundle().sh("exit 0"), "b");
    assert_eq!(stopped.exit_code(), 0);
    stopped.wait_for_status("stopped");

    let quiet = world.call(["list", "-q"]).output().ok().stdout();
    assert_eq!(quiet, format!("{}\n{}\n", created.id, stopped.id));

    let table = world.call(["list"]).output().ok().stdout();
    let rows: Vec<Vec<&str>> = table
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(
        rows[0],
        ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    );
    assert_eq!(
        rows[1][..3],
        [&created.id, &created.pid.to_string(), "created"]
    );
    assert_eq!(rows[2][..3], [&stopped.id, "0", "stopped"]);
    assert_eq!(rows[1][5], "root");
    assert_eq!(rows.len(), 3);
    let columns: Vec<_> = table
        .lines()
        .map(|l| l.find(rows[0][2]).or(l.find("created ")))
        .collect();
    assert_eq!(columns[0], columns[1], "columns are aligned:\n{table}");

    for flag in ["-f", "--format"] {
        let json = world.call(["list", flag, "json"]).output().ok();
        assert!(json.stdout.ends_with(b"}]\n"));
        let list: Vec<Value> = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!(list.len(), 2);
        assert_eq!(list[0], {
            // `list` resolves the owner's name, `state` does not.
            let mut state = created.state();
            state["owner"] = list[0]["owner"].clone();
            state
        });
        assert_eq!(list[0]["owner"], "root");
        assert_eq!(list[1]["status"], "stopped");
    }
}

#[test]
fn list_without_containers_is_a_header_or_null() {
    let world = World::new();
    let table = world.call(["list"]).output().ok().stdout();
    let words: Vec<_> = table.split_whitespace().collect();
    assert_eq!(words, ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    assert_eq!(table.lines().count(), 1);
    let json = world
        .call(["list", "--format", "json"])
        .output()
        .ok()
        .stdout();
    assert_eq!(json, "null\n");
    assert_eq!(world.call(["list", "--quiet"]).output().ok().stdout(), "");
}

#[test]
fn an_unknown_format_is_refused() {
    let world = World::new();
    let _ = world
        .call(["list", "--format", "xml"])
        .output()
        .fails_about(1, "format");
}
