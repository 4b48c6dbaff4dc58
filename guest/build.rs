//! Linker settings of the agent.

fn main() {
    // Relocations of the position-independent static binary in the packed form:
    // half a megabyte less to load into each guest.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    println!("cargo:rerun-if-changed=build.rs");
}
