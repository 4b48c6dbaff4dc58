//! Machines that are made of a template: each is itself, and otherwise like one that was
//! booted.
//!
//! The ones that make templates need the built-in hypervisor: `scripts/test-kvm` runs them.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kuasar_runv_test_harness::{
    Container, Netns, Output, SHORT, Value, World, process, wait_until,
};

/// For a boot of a machine in a machine.
const BOOT: Duration = Duration::from_secs(180);
const NEEDS: &str = "hypervisor = \"builtin\"";

fn enable(world: &mut World, more: &str) {
    let config = fs::read_to_string(world.path("config.toml")).unwrap();
    let dir = templates(world);
    world.configure(&format!(
        "{config}{more}\n[template]\nenabled = true\ndir = {dir:?}\n"
    ));
}

fn templates(world: &World) -> PathBuf {
    world.path("templates")
}

fn template(world: &World, args: &[&str]) -> Output {
    let call = world.call([&["template"], args].concat());
    call.deadline(BOOT).output()
}

/// Makes a template and returns its key.
fn create(world: &World) -> String {
    let out = template(world, &["create"]).ok().stdout();
    let key = out.split_whitespace().next().unwrap().to_owned();
    assert_eq!(key.len(), 8, "{out}");
    key
}

fn list(world: &World) -> Vec<Value> {
    let out = template(world, &["list", "--json"]).ok();
    serde_json::from_slice(&out.stdout).unwrap()
}

/// The kernel's command line says whose it is.
fn is_restored(container: &Container<'_>) -> bool {
    let out = container.exec_sh(&[], "cat /proc/cmdline").ok();
    out.stdout().contains("kuasar.template=1")
}

#[test]
fn another_hypervisor_refuses_and_leaves_nothing() {
    let mut world = World::new();
    let config = fs::read_to_string(world.path("config.toml")).unwrap();
    let line = config.lines().next().unwrap();
    world.configure(&config.replace(line, "hypervisor = \"qemu\""));
    enable(&mut world, "");
    let _ = template(&world, &["create"]).fails_with(1, NEEDS);
    assert!(!templates(&world).exists());
    let _ = template(&world, &["rm", "01234567"]).fails_with(1, "there is no template 01234567");
    assert!(list(&world).is_empty());
    // Pods start all the same.
    let out = world.run(&world.bundle().sh("echo up"), "c").ok();
    assert_eq!(out.stdout(), "up\n");
}

#[test]
fn the_command_line_is_checked() {
    let world = World::new();
    let _ = template(&world, &["rm"]).fails_with(1, "required");
    let _ = template(&world, &["rm", "--all", "--stale"]).fails_with(1, "cannot be used with");
    let _ = template(&world, &["make"]).fails_with(3, "make");
    let _ = template(&world, &["rm", "--stale"]).ok();
}

#[test]
#[ignore = "makes the template that scripts/test-kvm --templates uses for other tests"]
fn the_template_of_the_tests_is_made() {
    assert!(std::env::var_os("KUASAR_RUNV_TEST_TEMPLATES").is_some());
    let _ = create(&World::new());
}

mod restored {
    use super::*;

    #[test]
    #[ignore = "needs the built-in hypervisor, see scripts/test-kvm"]
    fn machines_of_a_template_have_nothing_in_common_that_nobody_may_know() {
        let mut world = World::new();
        enable(&mut world, "");
        let key = create(&world);
        let memory = templates(&world).join(&key).join("memory");
        let before = fs::metadata(&memory).unwrap();
        let script = "echo boot=$(cat /proc/sys/kernel/random/boot_id)
            echo uuid=$(cat /proc/sys/kernel/random/uuid)
            echo random=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n')
            echo time=$(date +%s)
            echo secret > /dev/shm/file; sleep 1000";
        let bundle = world.bundle().sh(script);
        let facts = |container: &Container<'_>| {
            container.wait_for_output("time=");
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            let text = container.stdout();
            let fact = |name: &str| {
                let line = text.lines().find_map(|l| l.strip_prefix(name));
                line.unwrap_or_else(|| panic!("{name} {text}")).to_owned()
            };
            let time: u64 = fact("time=").parse().unwrap();
            assert!(now.as_secs().abs_diff(time) <= 20, "{time} {now:?}");
            [fact("boot="), fact("uuid="), fact("random=")]
        };
        let one = world.start(&bundle, "one");
        let first = facts(&one);
        let other = world.start(&bundle, "other");
        let second = facts(&other);
        assert!(is_restored(&one) && is_restored(&other));
        for (one, other) in first.iter().zip(&second) {
            assert!(one.len() >= 32 && one != other, "{one} {other}");
        }
        // Once it is known, it stays.
        let again = one.exec_sh(&[], "cat /proc/sys/kernel/random/boot_id").ok();
        assert_eq!(again.stdout().trim(), first[0]);
        let after = fs::metadata(&memory).unwrap();
        assert_eq!(before.modified().unwrap(), after.modified().unwrap());
        // Without the template they go on.
        let _ = template(&world, &["rm", &key]).ok();
        assert!(list(&world).is_empty());
        let _ = other.exec_sh(&[], "cat /dev/shm/file").ok();
    }

    #[test]
    #[ignore = "needs the built-in hypervisor, see scripts/test-kvm"]
    fn a_machine_of_a_template_grows_pauses_and_ends_like_any_other() {
        let mut world = World::new();
        enable(
            &mut world,
            "[vm]\nvcpus = 2\nmax_vcpus = 3\nmax_memory_mib = 1024\n",
        );
        let _ = create(&world);
        let bundle = world.bundle().sh("echo up; sleep 1000");
        let container = world.start(&bundle, "c");
        container.wait_for_output("up");
        assert!(is_restored(&container));
        let facts = "echo cpus=$(nproc); while read name kib rest; do
            if [ $name = MemTotal: ]; then echo mib=$((kib / 1024)); fi; done < /proc/meminfo";
        let size = || {
            let out = container.exec_sh(&[], facts).ok();
            let number = |key: &str| out.fact(key).parse::<u64>().unwrap();
            (number("cpus"), number("mib"))
        };
        assert_eq!(size().0, 2);
        let update = ["update", "--memory", "800m", "--cpuset-cpus", "0-2"];
        let _ = container.command(&update).ok();
        let (cpus, mib) = size();
        assert!(cpus == 3 && (850..=1024).contains(&mib), "{cpus} {mib}");
        let _ = container.command(&["pause"]).ok();
        container.wait_for_status("paused");
        let _ = container.command(&["resume"]).ok();
        container.wait_for_status("running");
        assert_eq!(container.exec_sh(&[], "exit 9").code(), 9);
        let _ = container.kill("KILL").ok();
        assert_eq!(container.exit_code(), 137);
        let _ = container.delete().ok();
        world.assert_clean();
    }

    #[test]
    #[ignore = "needs the built-in hypervisor, see scripts/test-kvm"]
    fn what_does_not_fit_is_not_used_and_said() {
        let mut world = World::new();
        let image = world.path("image");
        let config = fs::read_to_string(world.path("config.toml")).unwrap();
        let of_config = config.lines().find_map(|l| l.strip_prefix("image = "));
        let of_config = of_config.unwrap().trim_matches('"').to_owned();
        fs::copy(&of_config, &image).unwrap();
        world.configure(&config.replace(&of_config, &image.display().to_string()));
        enable(&mut world, "");
        // Two at once: one makes it, the other finds it.
        let create_call = || {
            world
                .call(["template", "create"])
                .deadline(2 * BOOT)
                .spawn()
        };
        let (one, other) = (create_call(), create_call());
        let texts = [one.wait().ok().stdout(), other.wait().ok().stdout()];
        let exists = texts.iter().filter(|text| text.contains("exists"));
        assert_eq!(exists.count(), 1, "{texts:?}");
        let key = &texts[0][..8];
        assert_eq!(list(&world)[0]["status"], "current");

        let start = |name: &str| world.start(&world.bundle().sh("echo up; sleep 1000"), name);
        let dir = templates(&world).join(key);
        let memory = fs::File::options().write(true).open(dir.join("memory"));
        let memory = memory.unwrap();
        let len = memory.metadata().unwrap().len();
        memory.set_len(len - 4096).unwrap();
        let cut = start("cut");
        assert!(!is_restored(&cut));
        let warning = log(&world, "cut");
        assert!(warning.contains("the template cannot be used"), "{warning}");
        let _ = cut.delete_force().ok();
        memory.set_len(len).unwrap();

        let state = fs::read(dir.join("state")).unwrap();
        fs::write(dir.join("state"), &state[..state.len() / 2]).unwrap();
        assert_eq!(list(&world)[0]["status"], "broken");
        fs::write(dir.join("state"), &state).unwrap();

        // Another image, with the same content.
        fs::rename(&image, world.path("old")).unwrap();
        fs::copy(world.path("old"), &image).unwrap();
        assert_eq!(list(&world)[0]["status"], "stale");
        assert_eq!(list(&world)[0]["reason"], "another guest image");
        let booted = start("booted");
        assert!(!is_restored(&booted));
        let _ = template(&world, &["rm", "--stale"]).ok();
        assert!(list(&world).is_empty());
    }

    /// What the sandboxer of a container has said.
    fn log(world: &World, name: &str) -> String {
        let dir = world.root.join("sandboxes").join(world.id(name));
        fs::read_to_string(dir.join("sandboxer.log")).unwrap()
    }

    /// A template is trusted, but one whose memory was damaged costs time and no pod.
    #[test]
    #[ignore = "needs the built-in hypervisor, see scripts/test-kvm"]
    fn a_machine_that_does_not_come_up_is_booted_instead() {
        let mut world = World::new();
        enable(&mut world, "");
        let key = create(&world);
        let memory = templates(&world).join(&key).join("memory");
        let memory = fs::File::options().read(true).write(true).open(&memory);
        let memory = memory.unwrap();
        let pages = memory.metadata().unwrap().len() / 4096;
        let fill_what_is_used = |pattern: [u8; 2]| {
            let (mut page, pattern) = ([0; 4096], pattern.repeat(2048));
            for at in (0..pages).map(|number| number * 4096) {
                memory.read_exact_at(&mut page, at).unwrap();
                if page.iter().any(|byte| *byte != 0) {
                    memory.write_all_at(&pattern, at).unwrap();
                }
            }
        };
        // Neither has page tables any more.
        for (name, pattern) in [("garbage", [0xeb, 0xfe]), ("nothing", [0; 2])] {
            fill_what_is_used(pattern);
            let script = "echo up >/dev/shm/file; cat /dev/shm/file; sleep 1000";
            let container = world.start(&world.bundle().sh(script), name);
            container.wait_for_output("up");
            assert!(!is_restored(&container));
            let said = log(&world, name);
            assert!(said.contains("made of the template"), "{said}");
            assert!(said.contains("and one is booted instead: "), "{said}");
            let _ = container.kill("KILL").ok();
            assert_eq!(container.exit_code(), 137);
            let _ = container.delete().ok();
        }
        world.assert_clean();
    }

    /// Each gets its own cards, although the kernel that finds them is the same.
    #[test]
    #[ignore = "needs the built-in hypervisor, see scripts/test-kvm"]
    fn machines_of_a_template_have_networks_of_their_own() {
        let mut world = World::new();
        enable(&mut world, "");
        let _ = create(&world);
        let outer = Netns::new(&world, "out");
        let mut seen = Vec::new();
        let mut containers = Vec::new();
        let mut inner = Vec::new();
        for number in [2, 3] {
            let netns = Netns::new(&world, &format!("in{number}"));
            let (address, peer) = (format!("10.77.{number}.2/24"), format!("veth{number}"));
            netns.connect("eth0", &[&address], &outer, &peer);
            let gateway = format!("10.77.{number}.1");
            outer.address(&peer, &[&format!("{gateway}/24")]);
            netns.ip(&format!("route add default via {gateway}"));
            let script = format!(
                "echo mac=$(cat /sys/class/net/eth0/address); ip -o addr show dev eth0
                ping -q -c 1 -W 5 {gateway} | grep -q ' 0% packet loss' && echo reached; sleep 1000"
            );
            let bundle = world.bundle().sh(&script).network(&netns.path());
            let container = world.start(&bundle, &format!("c{number}"));
            container.wait_for_output("reached");
            assert!(is_restored(&container));
            let said = container.stdout();
            assert!(said.contains(&address), "{said}");
            let mac = said.lines().find_map(|line| line.strip_prefix("mac="));
            let mac = mac.unwrap().to_owned();
            let on_host = netns.ip("-o link show eth0");
            assert!(on_host.contains(&mac), "{mac} {on_host}");
            assert!(!seen.contains(&mac), "{mac}");
            seen.push(mac);
            containers.push(container);
            inner.push(netns);
        }
        // By way of the host, as two pods of it.
        outer.exec("sysctl", "-qw net.ipv4.ip_forward=1").ok();
        let ping = "ping -q -c 1 -W 5 10.77.2.2 | grep -q ' 0% packet loss'";
        let _ = containers[1].exec_sh(&[], ping).ok();
        // One that comes later as well.
        inner[1].connect("eth1", &["10.78.3.2/24"], &outer, "late");
        outer.address("late", &["10.78.3.1/24"]);
        let ping =
            "until ping -q -c 1 -W 5 10.78.3.1 | grep -q ' 0% packet loss'; do sleep 0.1; done";
        let _ = containers[1].exec_sh(&[], ping).ok();
    }

    #[test]
    #[ignore = "needs the built-in hypervisor, see scripts/test-kvm"]
    fn a_create_that_is_interrupted_leaves_nothing() {
        let mut world = World::new();
        enable(&mut world, "");
        let running = world.call(["template", "create"]).deadline(BOOT).spawn();
        let dir = templates(&world);
        let is_there = || fs::read_dir(&dir).is_ok_and(|entries| entries.count() > 0);
        wait_until("a template is being made", SHORT, is_there);
        process::signal(running.pid, libc::SIGINT).unwrap();
        // As by the signal, but not before it has cleaned up.
        let _ = running.wait().exits_with(130);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        world.assert_clean();
    }
}
