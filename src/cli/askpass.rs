//! Asks for a password on the terminal.
//!
//! The interrupt key (Ctrl-C) ends the line here and sends no signal: a signal would end the process before the terminal's
//! echo is switched on again.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, tcgetattr, tcsetattr};

use crate::model::target::Password;

/// Prints the prompt and reads a line without echo. `None`: the interrupt key was pressed.
///
/// # Errors
/// There is no terminal, or it is closed.
pub(super) fn ask(prompt: &str) -> io::Result<Option<Password>> {
    let mut terminal = File::options().read(true).write(true).open("/dev/tty")?;
    let before = tcgetattr(&terminal)?;
    let interrupt = before.special_codes[SpecialCodeIndex::VINTR];
    let mut hidden = before.clone();
    hidden.local_modes -= LocalModes::ECHO | LocalModes::ISIG;
    hidden.special_codes[SpecialCodeIndex::VEOL] = interrupt;
    tcsetattr(&terminal, OptionalActions::Flush, &hidden)?;
    let typed = terminal.write_all(prompt.as_bytes()).and_then(|()| line(&mut terminal, interrupt));
    tcsetattr(&terminal, OptionalActions::Now, &before)?;
    terminal.write_all(b"\n")?;
    Ok(typed?.map(Password::from))
}

/// Reads one line without its newline; `None` if the interrupt key ended it.
fn line(terminal: &mut File, interrupt: u8) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        match terminal.read(&mut byte) {
            Ok(0) if line.is_empty() => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(0) => return Ok(Some(line)),
            Ok(_) if byte[0] == b'\n' => return Ok(Some(line)),
            Ok(_) if byte[0] == interrupt => return Ok(None),
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
