//! `ttlsweep completions` and `ttlsweep man`: shell completions and man pages, generated from the program's arguments for packages.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::exit::Exit;
use crate::cli::{Cli, output};

/// `ttlsweep completions`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ttlsweep completions bash >~/.local/share/bash-completion/completions/ttlsweep
  ttlsweep completions zsh >~/.zfunc/_ttlsweep
  ttlsweep completions fish >~/.config/fish/completions/ttlsweep.fish")]
pub(super) struct CompletionsArgs {
    /// Name of the shell
    shell: Shell,
}

/// `ttlsweep man`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ttlsweep man /usr/local/share/man/man1")]
pub(super) struct ManArgs {
    /// Folder for the pages; it is created if missing
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Prints the completion script of a shell.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) fn completions(args: &CompletionsArgs) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "ttlsweep", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}

/// Writes one page for the program and one for each subcommand.
///
/// # Errors
/// A folder that cannot be written.
pub(super) fn man(args: &ManArgs) -> anyhow::Result<Exit> {
    use anyhow::Context;
    let written = || format!("cannot write man pages to {}", args.dir.display());
    std::fs::create_dir_all(&args.dir).with_context(written)?;
    clap_mangen::generate_to(Cli::command(), &args.dir).with_context(written)?;
    Ok(Exit::Done)
}
