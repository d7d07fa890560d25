//! Output: numbers, tables, progress, stdout and stderr. A closed stream never causes a panic.

mod interrupt;
mod meter;
mod numbers;
mod table;

use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::builder::styling::{AnsiColor, Style};
use serde::Serialize;

use super::args::OutputArgs;
pub use interrupt::{Cancelled, handle_interrupts, handle_interrupts_with, interrupted, not_interrupted, take_interrupt};
pub use meter::{Meter, Unit};
pub use numbers::{ERROR_COLUMNS, bytes, count, duration, error_value, first_of, grouped, median, plural, share};
pub use table::Table;

/// Seconds since 1970, for templates that print the date.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed())
}

/// The output of one run.
#[derive(Debug, Clone, Copy)]
pub struct Ui {
    json: bool,
    quiet: bool,
}

impl From<OutputArgs> for Ui {
    fn from(args: OutputArgs) -> Self {
        Self { json: args.json, quiet: args.quiet }
    }
}

impl Ui {
    /// For a command without `--quiet`.
    pub fn new(json: bool) -> Self {
        Self { json, quiet: false }
    }

    /// The result, on stdout: `document` with `--json`, otherwise (unless quiet) `text`.
    ///
    /// # Errors
    /// If stdout cannot be written. A reader that closes the pipe (`| head`) is not an error.
    pub fn result(self, document: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json {
            let document = serde_json::to_string_pretty(document).context("cannot print the result as JSON")?;
            return print(&format!("{document}\n"));
        }
        if self.quiet { Ok(()) } else { print(&text()) }
    }

    /// Prints a part of a streamed result; with `--json` the whole result follows at the end.
    /// [`ControlFlow::Break`] if the reader closed the pipe.
    ///
    /// # Errors
    /// As [`Ui::result`].
    pub fn stream(self, piece: &str) -> anyhow::Result<ControlFlow<()>> {
        if self.json || piece.is_empty() { Ok(ControlFlow::Continue(())) } else { write(piece) }
    }

    /// Prints a note.
    pub fn note(self, text: &str) {
        if !self.quiet {
            labelled("note", AnsiColor::Cyan, text);
        }
    }

    /// Prints a warning.
    pub fn warning(self, text: &str) {
        if !self.quiet {
            labelled("warning", AnsiColor::Yellow, text);
        }
    }

    /// Prints the stage of the command.
    pub fn stage(self, text: &str) {
        if !self.quiet {
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// Progress of a command that is `verb`-ing, counted in `unit`.
    pub fn meter(self, verb: &'static str, unit: Unit) -> Meter {
        self.meter_from(verb, unit, 0)
    }

    /// Progress of work whose first `done` units were done earlier and do not count for the rate.
    pub fn meter_from(self, verb: &'static str, unit: Unit, done: u64) -> Meter {
        if self.quiet { Meter::Silent } else { Meter::new(verb, unit, done, io::stderr().is_terminal()) }
    }
}

/// Writes a result to stdout.
///
/// # Errors
/// As [`Ui::result`].
pub fn print(text: &str) -> anyhow::Result<()> {
    write(text).map(|_| ())
}

/// [`print`]; returns whether the reader is still there.
fn write(text: &str) -> anyhow::Result<ControlFlow<()>> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(e) => Err(e).context("cannot write to stdout"),
    }
}

/// Asks for a line.
pub fn prompt(sign: &str) {
    let mut stderr = io::stderr();
    let _ = write!(stderr, "{sign}").and_then(|()| stderr.flush());
}

/// A line `label: text` on stderr.
pub fn labelled(label: &str, colour: AnsiColor, text: &str) {
    let style = if stderr_has_colour() { colour.on_default().bold() } else { Style::new() };
    let _ = writeln!(io::stderr(), "{style}{label}:{style:#} {text}");
}

/// By <https://no-color.org>.
fn colour_wanted() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

fn stderr_has_colour() -> bool {
    io::stderr().is_terminal() && colour_wanted()
}
