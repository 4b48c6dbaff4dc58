//! Linker settings of the host binary.

fn main() {
    // Relocations of the position-independent static binary in the packed form:
    // half a megabyte less in every resident process's file.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    println!("cargo:rerun-if-changed=build.rs");
}
