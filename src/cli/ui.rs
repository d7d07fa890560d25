//! Output: numbers, tables, progress, stdout and stderr. A closed stream never causes a panic.

mod meter;

use std::fmt::{self, Display};
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::builder::styling::{AnsiColor, Style};
use serde::Serialize;

use super::args::OutputArgs;
pub use crate::train::record::{duration, median};
pub use meter::{Meter, Unit};

/// Ctrl-C stopped the work: results are saved, partial output is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stopped before the end")]
pub struct Cancelled;

/// Set by Ctrl-C and SIGTERM; every long-running command checks it.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether the user asked to stop.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Whether the user asked to stop; clears the request.
pub fn take_interrupt() -> bool {
    INTERRUPTED.swap(false, Ordering::Relaxed)
}

/// Fails if the user asked to stop.
///
/// # Errors
/// [`Cancelled`].
pub fn not_interrupted() -> Result<(), Cancelled> {
    if interrupted() { Err(Cancelled) } else { Ok(()) }
}

/// Makes Ctrl-C and SIGTERM stop the command in order: it saves what it can and removes partial
/// output. A second signal ends the program at once.
///
/// # Errors
/// If the system refuses to set a handler.
pub fn handle_interrupts() -> anyhow::Result<()> {
    handle_interrupts_with(|| {})
}

/// As [`handle_interrupts`]; `on_signal` acknowledges the first signal at once.
///
/// # Errors
/// As [`handle_interrupts`].
pub fn handle_interrupts_with(on_signal: impl Fn() + Send + 'static) -> anyhow::Result<()> {
    let asked = move || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            let _ = writeln!(io::stderr(), "\nended at once; temporary files may be left");
            std::process::exit(1);
        }
        on_signal();
    };
    ctrlc::set_handler(asked).context("cannot handle Ctrl-C")
}

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

/// Three digits and a prefix: `999`, `1.23k`, `440M`, `3.63G`.
fn three_digits(n: f64, prefixes: &[&str]) -> String {
    let (mut n, mut step) = (n, 0);
    // 999.5 would be shown as 1000.
    while n >= 999.5 && step + 1 < prefixes.len() {
        n /= 1000.0;
        step += 1;
    }
    let digits = match n {
        _ if step == 0 && n.fract() == 0.0 => 0,
        n if n < 9.995 => 2,
        n if n < 99.95 => 1,
        _ => 0,
    };
    format!("{n:.digits$}{}", prefixes.get(step).unwrap_or(&""))
}

/// A number of things.
pub fn count(n: f64) -> String {
    three_digits(n, &["", "k", "M", "G", "T"])
}

/// A number of bytes, in powers of 1000 as storage is sold.
pub fn bytes(n: f64) -> String {
    three_digits(n, &[" B", " kB", " MB", " GB", " TB"])
}

/// All digits, in groups: `545,259,520`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1 tensor`, `2 tensors`.
pub fn plural(n: u64, thing: &str) -> String {
    format!("{} {thing}{}", grouped(n), if n == 1 { "" } else { "s" })
}

/// Names that are shown of many.
const SHOWN: usize = 4;

/// The first few of a list, and how many more there are.
pub fn first_of(names: &[String]) -> String {
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// What the columns of errors mean.
pub const ERROR_COLUMNS: &str = "(relative error: squared error per squared weight; worst block: norm of the errors over norm \
                                 of the weights, of the block where that is largest)";

/// A part of a whole, in percent.
pub fn share(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

/// A relative or absolute error: three digits, without an exponent where that is readable.
pub fn error_value(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    // The exponent after rounding, which can be one more than that of the value.
    let short = format!("{value:.2e}");
    let exponent = short.split_once('e').and_then(|(_, e)| e.parse::<i32>().ok());
    match exponent {
        Some(e @ -4..=2) => format!("{value:.0$}", usize::try_from(2 - e).unwrap_or(0)),
        _ => short,
    }
}

/// Columns with two spaces between them; text is aligned to the left, numbers to the right.
#[derive(Debug)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Row>,
}

/// How a column is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    Left,
    Right,
}

#[derive(Debug)]
enum Row {
    Cells(Vec<String>),
    Rule,
}

impl Table {
    /// A table with these titles; one that starts with `>` heads a column of numbers.
    pub fn new(titles: &[&str]) -> Self {
        let column = |title: &&str| if title.starts_with('>') { Column::Right } else { Column::Left };
        let cells = titles.iter().map(|title| title.trim_start_matches('>').to_owned()).collect();
        Self { columns: titles.iter().map(column).collect(), rows: vec![Row::Cells(cells), Row::Rule] }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [&dyn Display; N]) {
        // Names come from files: what is printed must not steer the terminal.
        let plain = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
        let cell = |cell: &&dyn Display| cell.to_string().chars().map(plain).collect();
        self.rows.push(Row::Cells(cells.iter().map(cell).collect()));
    }

    /// Adds a line, above a sum.
    pub fn rule(&mut self) {
        self.rows.push(Row::Rule);
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths = vec![0; self.columns.len()];
        for row in &self.rows {
            let Row::Cells(cells) = row else { continue };
            widths.iter_mut().zip(cells).for_each(|(width, cell)| *width = (*width).max(cell.chars().count()));
        }
        widths
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        for row in &self.rows {
            let Row::Cells(cells) = row else {
                writeln!(f, "{}", widths.iter().map(|&w| "─".repeat(w)).collect::<Vec<_>>().join("  "))?;
                continue;
            };
            let padded = cells.iter().zip(&widths).zip(&self.columns).map(|((cell, &width), column)| match column {
                Column::Left => format!("{cell:<width$}"),
                Column::Right => format!("{cell:>width$}"),
            });
            writeln!(f, "{}", padded.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(count(0.0), "0");
        assert_eq!(count(999.0), "999");
        assert_eq!(count(1000.0), "1.00k");
        assert_eq!(count(440_401_920.0), "440M");
        assert_eq!(count(58_720_256.0), "58.7M");
        assert_eq!(count(999_600_000.0), "1.00G");
        assert_eq!(bytes(545_259_520.0), "545 MB");
        assert_eq!(bytes(12.0), "12 B");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(123), "123");
        assert_eq!(plural(1, "file"), "1 file");
        assert_eq!(plural(2000, "file"), "2,000 files");
        assert_eq!(error_value(0.0), "0");
        assert_eq!(error_value(0.007_891), "0.00789");
        assert_eq!(error_value(0.125), "0.125");
        assert_eq!(error_value(0.9996), "1.00");
        assert_eq!(error_value(1.5e-6), "1.50e-6");
    }

    #[test]
    fn a_table_aligns_text_and_numbers() {
        let mut table = Table::new(&["name", ">n"]);
        table.row([&"a", &1000]);
        table.rule();
        table.row([&"total", &7]);
        let expected = "name      n\n─────  ────\na      1000\n─────  ────\ntotal     7\n";
        assert_eq!(table.to_string(), expected);
    }
}
