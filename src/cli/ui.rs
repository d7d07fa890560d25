//! Output: numbers, tables, progress, stdout and stderr. A closed stream never causes a panic.

mod door;
mod interrupt;
mod meter;
mod numbers;
mod table;

use std::ops::ControlFlow;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::builder::styling::AnsiColor;
use serde::Serialize;

use super::args::OutputArgs;
pub use door::{labelled, one_line, print, print_json, print_usage, prompt, say, visible_arguments};
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
            return print_json(&format!("{document}\n"));
        }
        if self.quiet { Ok(()) } else { print(&text()) }
    }

    /// With `--json`, one result of several, as a line of JSON. [`ControlFlow::Break`] if the
    /// reader closed the pipe.
    ///
    /// # Errors
    /// As [`Ui::result`].
    pub fn json_line(self, document: &impl Serialize) -> anyhow::Result<ControlFlow<()>> {
        if !self.json {
            return Ok(ControlFlow::Continue(()));
        }
        let document = serde_json::to_string(document).context("cannot print the result as JSON")?;
        door::print_json_line(&document)
    }

    /// Prints a part of a generated text; with `--json` the whole result follows at the end.
    /// [`ControlFlow::Break`] if the reader closed the pipe.
    ///
    /// # Errors
    /// As [`Ui::result`].
    pub fn stream(self, piece: &str) -> anyhow::Result<ControlFlow<()>> {
        if self.json || piece.is_empty() { Ok(ControlFlow::Continue(())) } else { door::print_generated(piece) }
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

    /// Prints the stage of the command: one line.
    pub fn stage(self, text: &str) {
        self.block(&one_line(text));
    }

    /// Prints lines, such as a table, on stderr. What files say must be [`one_line`] in it.
    pub fn block(self, text: &str) {
        if !self.quiet {
            door::say(text);
        }
    }

    /// Progress of a command that is `verb`-ing, counted in `unit`.
    pub fn meter(self, verb: &'static str, unit: Unit) -> Meter {
        self.meter_from(verb, unit, 0)
    }

    /// Progress of work whose first `done` units were done earlier and do not count for the rate.
    pub fn meter_from(self, verb: &'static str, unit: Unit, done: u64) -> Meter {
        if self.quiet { Meter::Silent } else { Meter::new(verb, unit, done, door::stderr_is_terminal()) }
    }
}
