//! The `ttlsweep` program. Everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ttlsweep::cli::main().into()
}
