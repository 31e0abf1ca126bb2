//! Programs of others that `make clients` has fetched.

use std::path::PathBuf;
use std::process::{Command, Output};

/// The checkout.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The path of a client that `make clients` has fetched.
pub fn client(name: &str) -> PathBuf {
    client_if_there(name).unwrap_or_else(|| panic!("{name} is not there: run `make clients`"))
}

/// The same for a client that not every system has.
pub fn client_if_there(name: &str) -> Option<PathBuf> {
    let output = Command::new(root().join("scripts/clients.sh")).arg(name).output().expect("clients.sh runs");
    Some(PathBuf::from(String::from_utf8(output.stdout).expect("a path").trim())).filter(|path| path.exists())
}

/// Runs a command without blocking the test's own server tasks.
pub async fn output(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output()).await.expect("it ends").expect("it runs")
}
