#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| kuasar_runv::fuzzing::console(input));
