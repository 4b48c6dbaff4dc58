//! Network cards that a program of the host serves over vhost-user.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use kuasar_runv_test_harness::world::configuration;
use kuasar_runv_test_harness::{Bundle, Flavour, Netns, World, json};

use crate::disks::image;
use crate::pods;
use crate::served::Program;
use crate::switch;

const ANNOTATION: &str = "dev.kuasar-runv.network.vhost-user";
const MAC: &str = "02:00:00:00:ca:01";
const PING: &str = "ping -q -c 1 -W 5 10.88.0.1 | grep -q ' 0% packet loss' && echo reached";

/// A world where programs may serve cards, and where their sockets are.
fn world() -> (World, PathBuf) {
    let mut world = World::new();
    let sockets = world.path("sockets");
    fs::create_dir(&sockets).unwrap();
    let network = format!("[network]\nvhost_user = [{sockets:?}]\n");
    world.configure(&format!("{}{network}", configuration(Flavour::Source)));
    (world, sockets)
}

fn with_card(bundle: Bundle, socket: &Path) -> Bundle {
    let cards = json!([{
        "name": "fast0", "socket": socket, "mac": MAC, "mtu": 1400,
        "addresses": ["10.88.0.2/24", "fd88::2/64"],
        "routes": [{ "to": "default", "via": "10.88.0.1", "metric": 7 }],
    }]);
    bundle
        .with(|config| config["annotations"][ANNOTATION] = json!(cards.to_string()))
        .capabilities(&["CAP_NET_RAW", "CAP_NET_ADMIN"])
}

#[test]
fn a_card_of_a_program_is_an_interface_of_the_container() {
    let (world, sockets) = world();
    let outer = Netns::new(&world, "out");
    let socket = sockets.join("card");
    let program = switch::start(&outer, &socket, "sw0", "10.88.0.1/24");
    let script = format!(
        "cd /sys/class/net/fast0; echo mac=$(cat address) mtu=$(cat mtu) carrier=$(cat carrier)
        ip -o addr show dev fast0; ip route; {PING}
        until [ $(cat carrier) = 0 ]; do sleep 0.1; done; echo down; sleep 1000"
    );
    let bundle = with_card(world.bundle().sh(&script), &socket);
    let container = world.start(&bundle, "c");
    container.wait_for_output("reached\n");
    let said = container.stdout();
    for words in [
        &format!("mac={MAC} mtu=1400 carrier=1"),
        "inet 10.88.0.2/24 brd 10.88.0.255",
        "inet6 fd88::2/64",
        "default via 10.88.0.1 dev fast0",
        "metric 7",
        "10.88.0.0/24 dev fast0",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    // The other way round, and more than one packet.
    let ping = outer.exec("busybox", "ping -q -c 20 -i 0.05 -s 1300 -W 5 10.88.0.2");
    let said = ping.ok().stdout();
    assert!(said.contains(" 0% packet loss"), "{said}");
    // The program ends: the card is down, and the rest goes on.
    drop(program);
    container.wait_for_output("down\n");
    let _ = container.exec_sh(&[], "echo still here").ok();
    let _ = container.delete_force().ok();
    drop(outer);
    world.assert_clean();
}

/// The card of a member that has a network of its own comes and goes with it; the program
/// serves the next.
#[test]
fn a_card_comes_and_goes_with_a_member_of_a_pod() {
    let (world, sockets) = world();
    let outer = Netns::new(&world, "out");
    let first = pods::sandbox(&world, "s");
    for round in ["one", "two"] {
        let socket = sockets.join(round);
        let tap = format!("sw-{round}");
        let _program = switch::start(&outer, &socket, &tap, "10.88.0.1/24");
        let bundle = pods::member(&world, &first.id, &format!("{PING}; sleep 1000"));
        let member = world.start(&with_card(bundle, &socket), round);
        member.wait_for_output("reached\n");
        let _ = member.delete_force().ok();
        let _ = first.exec_sh(&[], "[ ! -e /sys/class/net/fast0 ]").ok();
    }
    let _ = first.delete_force().ok();
    drop(outer);
    world.assert_clean();
}

/// Two interfaces of one name would be one too many in the container.
#[test]
fn a_card_cannot_have_the_name_of_an_interface() {
    let (world, sockets) = world();
    let (inner, outer) = (Netns::new(&world, "in"), Netns::new(&world, "out"));
    inner.connect("fast0", &["10.77.0.2/24"], &outer, "veth0");
    let socket = sockets.join("card");
    let program = switch::start(&outer, &socket, "sw0", "10.88.0.1/24");
    let bundle = world.bundle().sh("exit 0").network(&inner.path());
    let container = world.create(&with_card(bundle, &socket), "c");
    let said = container.command(&["start"]);
    let said = said.fails_with(1, "fast0").stderr();
    let words = "the network namespace has an interface of this name";
    assert!(said.contains(words), "{said}");
    let _ = container.delete_force().ok();
    assert_eq!(inner.links(), ["fast0"]);
    drop((program, inner, outer));
    world.assert_clean();
}

#[test]
fn what_serves_no_card_is_an_error_that_says_so() {
    let (world, sockets) = world();
    let bundle = |socket: &Path| with_card(world.bundle().sh("exit 0"), socket);
    // The caller may name no other socket.
    let elsewhere = world.path("elsewhere");
    let _listener = UnixListener::bind(&elsewhere).unwrap();
    let words = "is not below a directory of vhost_user in section [network]";
    let _ = world
        .try_create(&bundle(&elsewhere), "else")
        .fails_with(1, words);
    let link = sockets.join("link");
    std::os::unix::fs::symlink(&elsewhere, &link).unwrap();

    let hasty = sockets.join("hasty");
    let listener = UnixListener::bind(&hasty).unwrap();
    let closing = std::thread::spawn(move || drop(listener.accept()));
    let file = sockets.join("file");
    fs::write(&file, "").unwrap();
    let disk = Program::storage(&world, "sockets/disk", &image(&world, "image"));
    for (socket, words) in [
        (&link, "too many levels of symbolic links"),
        (&sockets.join("none"), "no such file or directory"),
        (&file, "it is not a socket"),
        (&hasty, "does not speak vhost-user"),
        (&sockets.join("disk"), "serves no network card"),
    ] {
        let name = socket.file_name().unwrap().to_str().unwrap();
        let container = world.create(&bundle(socket), name);
        let out = container.command(&["start"]);
        let said = out.fails_with(1, "the card fast0").stderr().to_lowercase();
        assert!(said.contains(words), "{name}: {said}");
        assert_eq!(container.status(), "created");
        let _ = container.delete_force().ok();
    }
    closing.join().unwrap();
    drop(disk);
    world.assert_clean();
}
