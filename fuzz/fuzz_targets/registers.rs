#![no_main]
//! Ports and registers, see `src/vm/builtin/fuzzing.rs`.

libfuzzer_sys::fuzz_target!(|input: &[u8]| kuasar_runv::fuzzing::registers(input));
