use super::*;

const HYBRID: &str = "\
30 25 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
34 30 0:29 / /mnt/again rw - cgroup cgroup rw,cpu,cpuacct
";

#[test]
fn a_hybrid_host_has_each_hierarchy_once() {
    let found = hierarchies(HYBRID);
    let points: Vec<_> = found.iter().map(|h| h.mount_point.as_path()).collect();
    assert_eq!(
        points,
        [
            Path::new("/sys/fs/cgroup/systemd"),
            Path::new("/sys/fs/cgroup/cpu,cpuacct"),
            Path::new("/sys/fs/cgroup/unified")
        ]
    );
    let own = "4:cpu,cpuacct:/user/a\n1:name=systemd:/init\n0::/v2\n";
    assert_eq!(own_cgroup(own, &found[0]), "/init");
    assert_eq!(own_cgroup(own, &found[1]), "/user/a");
    assert_eq!(own_cgroup(own, &found[2]), "/v2");
}

#[test]
fn a_v2_host_has_one_hierarchy() {
    let found = hierarchies("31 30 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    assert_eq!(found.len(), 1);
    assert_eq!(own_cgroup("0::/v2\n", &found[0]), "/v2");
}

#[test]
fn a_path_that_leads_upwards_is_refused() {
    assert!(directories(Some(Path::new("/a/../../etc")), "c1", None).is_err());
}

/// Directories of a cgroup of this test's own in every hierarchy.
fn own_directories(name: &str) -> Vec<PathBuf> {
    let path = format!("/kuasar-runv-test-{name}-{}", std::process::id());
    let made = directories(Some(Path::new(&path)), "c1", None).unwrap();
    create(&made).unwrap();
    made
}

#[test]
fn a_cgroup_that_is_busy_goes_when_its_process_has() {
    let made = own_directories("busy");
    let mut sleep = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    join(&made, sleep.id() as i32).unwrap();
    assert!(who_is_in(&made[0]).contains(&format!("{} (sleep)", sleep.id())));
    assert!(is_busy(&fs::remove_dir(&made[0]).unwrap_err()));
    let end = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        sleep.kill().unwrap();
        sleep.wait().unwrap();
    });
    remove(&made).unwrap();
    end.join().unwrap();
    assert!(made.iter().all(|dir| !dir.exists()));
}

#[test]
fn cgroups_that_somebody_made_below_go_too() {
    let made = own_directories("nested");
    for dir in &made {
        fs::create_dir_all(dir.join("a/b")).unwrap();
        fs::create_dir(dir.join("c")).unwrap();
    }
    remove(&made).unwrap();
    assert!(made.iter().all(|dir| !dir.exists()));
    // Again, as after a delete that was killed.
    remove(&made).unwrap();
}
