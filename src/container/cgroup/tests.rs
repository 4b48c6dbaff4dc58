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
