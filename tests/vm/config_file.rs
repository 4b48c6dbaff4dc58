//! The configuration file: mistakes are named with their line, settings reach the VM.

use std::fs;

use kuasar_runv_test_harness::world::configuration;
use kuasar_runv_test_harness::{Flavour, World};

#[test]
fn an_unknown_key_is_refused_with_file_and_line() {
    let mut world = World::new();
    world.configure("# comment\n\n[vm]\nvcpus = 1\nmemory_mb = 512\n");
    let bundle = world.bundle().sh("exit 0");
    let out = world.try_create(&bundle, "c").fails_with(1, "memory_mb");
    let place = format!("{}:5", world.path("config.toml").display());
    assert!(out.stderr().contains(&place), "{}", out.stderr());
    world.assert_clean();
}

#[test]
fn a_wrong_type_and_a_broken_file_are_refused_with_their_line() {
    let mut world = World::new();
    let bundle = world.bundle().sh("exit 0");
    for (text, line) in [
        ("[vm]\nvcpus = \"two\"\n", 2),
        ("[vm]\nvcpus = 0\n", 2),
        ("[vm\n", 1),
        ("\n[guest]\nkernel = \"relative/path\"\n", 3),
        ("hypervisor = \"no-such-hypervisor\"\n", 1),
    ] {
        world.configure(text);
        let place = format!("config.toml:{line}");
        let _ = world.try_create(&bundle, "c").fails_with(1, &place);
        world.assert_clean();
    }
}

#[test]
fn a_missing_configuration_file_that_was_named_is_an_error() {
    let world = World::new();
    let bundle = world.bundle().sh("exit 0");
    let call = world.create_call(bundle.path(), "c");
    let call = call.env("KUASAR_RUNV_CONFIG", world.path("missing.toml"));
    let _ = call.output().fails_with(1, "missing.toml");
    world.assert_clean();
}

#[test]
fn a_missing_kernel_image_or_hypervisor_is_named() {
    let mut world = World::new();
    let bundle = world.bundle().sh("exit 0");
    let [kernel, image] = ["vmlinux", "initramfs.img"].map(|name| Flavour::Source.artefact(name));
    let missing = world.path("missing");
    for (kernel, image, qemu) in [
        (&missing, &image, None),
        (&kernel, &missing, None),
        (&kernel, &image, Some(&missing)),
    ] {
        let mut text = format!("[guest]\nkernel = {kernel:?}\nimage = {image:?}\n");
        if let Some(qemu) = qemu {
            text += &format!("[qemu]\naccel = \"tcg\"\npath = {qemu:?}\n");
        }
        world.configure(&text);
        let out = world.try_create(&bundle, "c");
        let _ = out.fails_with(1, missing.to_str().unwrap());
        world.assert_clean();
    }
}

#[test]
fn a_kernel_that_is_none_fails_within_its_time() {
    let mut world = World::new();
    let kernel = world.path("kernel");
    fs::write(&kernel, "this is no kernel").unwrap();
    let image = Flavour::Source.artefact("initramfs.img");
    world.configure(&format!(
        "[guest]\nkernel = {kernel:?}\nimage = {image:?}\n[qemu]\naccel = \"tcg\"\n[timeouts]\nboot_s = 10\n"
    ));
    let bundle = world.bundle().sh("exit 0");
    let out = world.try_create(&bundle, "c").exits_with(1);
    assert!(!out.stderr().is_empty());
    world.assert_clean();
}

#[test]
fn a_guest_without_an_agent_fails_within_its_time() {
    let mut world = World::new();
    let kernel = Flavour::Source.artefact("vmlinux");
    let image = world.path("image");
    // An empty cpio archive.
    let trailer = format!(
        "070701{:0>8}{:0>8}{:0>8}{:0>8}{:08x}{}{:08x}{:08x}TRAILER!!!\0\0\0\0",
        0,
        0,
        0,
        0,
        1,
        "0".repeat(48),
        11,
        0
    );
    fs::write(&image, trailer).unwrap();
    world.configure(&format!(
        "[guest]\nkernel = {kernel:?}\nimage = {image:?}\n[qemu]\naccel = \"tcg\"\n[timeouts]\nboot_s = 15\n"
    ));
    let bundle = world.bundle().sh("exit 0");
    let out = world.try_create(&bundle, "c").exits_with(1);
    assert!(!out.stderr().is_empty());
    world.assert_clean();
}

#[test]
fn size_and_kernel_parameters_reach_the_vm() {
    let mut world = World::new();
    let guest = configuration(Flavour::Source);
    world.configure(&format!(
        "{guest}kernel_params = \"krt.marker=1\"\n[vm]\nvcpus = 2\nmemory_mib = 300\n"
    ));
    let script =
        "echo cpus=$(nproc); echo memory=$(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
        grep -q krt.marker=1 /proc/cmdline && echo marker=yes";
    let out = world.run_script(script).ok();
    assert_eq!(out.fact("cpus"), "2");
    let memory: u32 = out.fact("memory").parse().unwrap();
    assert!((200..=300).contains(&memory), "{memory} MiB");
    assert_eq!(out.fact("marker"), "yes");
}

/// A mistake in the file must not keep anybody from cleaning up.
#[test]
fn looking_and_deleting_need_no_configuration() {
    let mut world = World::new();
    let bundle = world.bundle().sh("sleep 1000");
    let stdout = (world.output_file("c.stdout"), world.output_file("c.stderr"));
    let call = world.create_call(bundle.path(), "c");
    let _ = call.output_to(stdout.0, stdout.1).output().ok();
    world.configure("no such key");
    let id = world.id("c");
    for args in [&["state"][..], &["delete", "--force"]] {
        let _ = world.call(args).arg(&id).output().ok();
    }
    let _ = world.call(["list"]).output().ok();
    world.assert_clean();
}

/// Asking /dev/kvm may take seconds; the answer holds until the next boot.
#[test]
fn the_accelerator_is_detected_once_and_remembered() {
    let mut world = World::new();
    world.configure(&configuration(Flavour::Source).replace("\"tcg\"", "\"auto\""));
    let answer = world.root.join("kvm.json");
    let read = || {
        let changed = fs::metadata(&answer).unwrap().modified().unwrap();
        (changed, fs::read_to_string(&answer).unwrap())
    };
    assert_eq!(world.run_script("echo first").ok().stdout(), "first\n");
    let first = read();
    assert_eq!(world.run_script("echo second").ok().stdout(), "second\n");
    assert_eq!(read(), first);
    // What is known about the machine stays when its containers go.
    for name in ["kvm.json", "kvm.lock"] {
        fs::remove_file(world.root.join(name)).unwrap();
    }
}
