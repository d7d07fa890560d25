//! The only file that writes to stdout and stderr.
//!
//! Names, texts and messages come from files that others wrote, so nothing reaches a stream before
//! it passed [`one_line`] or [`lines`]: a control character could move the cursor, change the
//! window's title or replace printed lines, and an invisible or reordering character could make a
//! name look like another one. Two texts pass as they are: JSON, for programs, and generated text
//! that is written to a file or a pipe.

use std::borrow::Cow;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::LazyLock;

use anyhow::Context;
use clap::builder::styling::{AnsiColor, Style};
use regex::Regex;

/// Characters that a terminal acts on or does not show: control characters (C0, DEL and C1), format
/// characters (zero width, bidirectional, tags), the separators of lines and paragraphs, and other
/// invisible characters, except the variation selectors of emoji.
const HIDDEN: &str = r"[\p{Cc}\p{Cf}\p{Zl}\p{Zp}[\p{Default_Ignorable_Code_Point}--[\u{fe00}-\u{fe0f}]]]";

static HIDDEN_PATTERN: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(HIDDEN).ok());

/// Text within a line: escapes all characters that a terminal acts on or does not show, line breaks
/// and tabs too. Escaped text is not escaped again.
pub fn one_line(text: &str) -> Cow<'_, str> {
    escaped(text, |_| false)
}

/// Text of several lines: as [`one_line`], but keeps line feeds and tabs.
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| matches!(c, '\n' | '\t'))
}

fn escaped(text: &str, keep: impl Fn(char) -> bool) -> Cow<'_, str> {
    let harmless = |c: char| keep(c) || matches!(c, ' '..='~');
    match &*HIDDEN_PATTERN {
        // Most texts need no search.
        _ if text.chars().all(harmless) => Cow::Borrowed(text),
        Some(pattern) => pattern.replace_all(text, |found: &regex::Captures<'_>| escape(&found[0], &keep)),
        // The pattern is a constant; without it, only ASCII is known to be harmless.
        None => Cow::Owned(text.chars().map(|c| escape(c.encode_utf8(&mut [0; 4]), harmless)).collect()),
    }
}

/// Escapes the characters that `keep` does not name: `\n`, `\u{1b}`.
fn escape(text: &str, keep: impl Fn(char) -> bool) -> String {
    let one = |c: char| if keep(c) { c.to_string() } else { c.escape_default().to_string() };
    text.chars().map(one).collect()
}

/// Writes a result to stdout, of several lines.
///
/// # Errors
/// If stdout cannot be written. A reader that closes the pipe (`| head`) is not an error.
pub fn print(text: &str) -> anyhow::Result<()> {
    write_stdout(&lines(text)).map(|_| ())
}

/// Writes JSON to stdout, as it is.
///
/// # Errors
/// As [`print`].
pub fn print_json(document: &str) -> anyhow::Result<()> {
    write_stdout(document).map(|_| ())
}

/// Writes JSON to stdout, as a line. [`ControlFlow::Break`] if the reader closed the pipe.
///
/// # Errors
/// As [`print`].
pub fn print_json_line(document: &str) -> anyhow::Result<ControlFlow<()>> {
    write_stdout(&format!("{document}\n"))
}

/// Writes a part of a generated text to stdout: escaped on a terminal, otherwise as it is.
/// [`ControlFlow::Break`] if the reader closed the pipe.
///
/// # Errors
/// As [`print`].
pub fn print_generated(piece: &str) -> anyhow::Result<ControlFlow<()>> {
    if io::stdout().is_terminal() { write_stdout(&lines(piece)) } else { write_stdout(piece) }
}

/// Writes to stdout; returns whether the reader is still there.
fn write_stdout(text: &str) -> anyhow::Result<ControlFlow<()>> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(e) => Err(e).context("cannot write to stdout"),
    }
}

/// Writes text of one or several lines to stderr, and a line feed.
pub fn say(text: &str) {
    // A closed stderr is no reason to fail.
    let _ = writeln!(io::stderr(), "{}", lines(text));
}

/// Writes a line `label: text` to stderr.
pub fn labelled(label: &str, colour: AnsiColor, text: &str) {
    let style = if stderr_has_colour() { colour.on_default().bold() } else { Style::new() };
    let _ = writeln!(io::stderr(), "{style}{label}:{style:#} {}", one_line(text));
}

/// Asks for a line.
pub fn prompt(sign: &str) {
    let mut stderr = io::stderr();
    let _ = write!(stderr, "{}", one_line(sign)).and_then(|()| stderr.flush());
}

/// Arguments without characters that a terminal acts on: an error of the command line repeats them,
/// and they can be names of files.
pub fn visible_arguments(arguments: &[OsString]) -> Vec<OsString> {
    arguments.iter().map(|argument| one_line(&argument.to_string_lossy()).into_owned().into()).collect()
}

/// Prints the help, the version, or an error about [`visible_arguments`]: help to stdout, errors to
/// stderr.
pub fn print_usage(message: &clap::Error) {
    // A closed stream is ignored.
    let _ = message.print();
}

/// By <https://no-color.org>.
fn colour_wanted() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

fn stderr_has_colour() -> bool {
    stderr_is_terminal() && colour_wanted()
}

/// Whether stderr is a terminal.
pub fn stderr_is_terminal() -> bool {
    io::stderr().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_a_terminal_acts_on_is_escaped() {
        assert_eq!(one_line("\x1b]0;pwned\x07"), r"\u{1b}]0;pwned\u{7}");
        assert_eq!(one_line("a\r\n\tb\x7f"), r"a\r\n\tb\u{7f}");
        assert_eq!(one_line("\u{9b}31m\u{90}"), r"\u{9b}31m\u{90}");
        let bidi = ["\u{202a}", "\u{202e}", "\u{2066}", "\u{2069}", "\u{200e}", "\u{200f}", "\u{61c}"];
        let invisible = ["\u{200b}", "\u{200d}", "\u{2060}", "\u{feff}", "\u{ad}", "\u{e0001}", "\u{e0041}", "\u{115f}"];
        let marks = ["\u{2028}", "\u{2029}", "\u{fff9}", "\u{180e}", "\u{e0100}", "\u{34f}"];
        for text in bidi.iter().chain(&invisible).chain(&marks) {
            let code = text.chars().next().unwrap() as u32;
            assert_eq!(one_line(text), format!("\\u{{{code:x}}}"));
            assert_eq!(lines(&format!("é{text}\n")), format!("é\\u{{{code:x}}}\n"));
        }
    }

    /// Every character of these classes, not only those that a test thought of.
    #[test]
    fn no_hidden_character_passes() {
        let allowed = |c: char| matches!(one_line(c.encode_utf8(&mut [0; 4])), Cow::Borrowed(_));
        let control = (0..0x20).chain(0x7f..0xa0);
        let bidi = (0x202a..0x202f).chain(0x2066..0x206a).chain(0x200b..0x2010).chain(0x2028..0x202a);
        let tags = 0xe0000..0xe1000;
        let passed: Vec<u32> =
            control.chain(bidi).chain(tags).filter(|&c| char::from_u32(c).is_some_and(&allowed)).collect();
        assert!(passed.is_empty(), "{passed:x?}");
    }

    #[test]
    fn text_stays_as_it_is() {
        for text in ["", "plain", "naïve 漢字 עברית ─ ⟦a⟧", "a family \u{1f468}, a heart \u{2764}\u{fe0f}", r"C:\new\u{1b}"]
        {
            assert!(matches!(one_line(text), Cow::Borrowed(same) if same == text), "{text}");
        }
        assert_eq!(lines("a\tb\nc"), "a\tb\nc");
        assert_eq!(lines("a\r\nb"), "a\\r\nb");
        let twice = one_line("\x1b[2J\n").into_owned();
        assert_eq!(one_line(&twice), twice);
    }
}
