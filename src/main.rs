//! `kuasar-runv`. Everything is in the library, so that fuzz targets reach it.

use std::process::ExitCode;

fn main() -> ExitCode {
    kuasar_runv::run()
}
