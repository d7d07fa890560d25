//! Chat templates as transformers renders them: the part of Jinja2 that they use, over values of
//! Python.
//!
//! Jinja2's and Python's rules decide what a template writes, down to how a float is printed, which
//! value has which method and what counts as iterable. What a template uses and this module lacks
//! is an error that names it ([`ErrorKind::Unsupported`]), never another text.
//! `tests/interop/templates.py` writes what transformers makes of some thousand snippets;
//! `tests.rs` compares.

mod args;
mod ast;
mod budget;
mod call;
mod error;
mod eval;
mod filters;
mod format;
#[cfg(test)]
mod hostile;
mod json;
mod lexer;
mod members;
mod methods;
mod names;
mod objects;
mod ops;
mod parser;
mod printf;
mod select;
mod spec;
mod steps;
#[cfg(test)]
mod tests;
mod text;
mod value;

pub use error::{ErrorKind, TemplateError};
pub use eval::Rendered;
pub use json::loads;
pub use value::{Dict, Value};

use std::cell::Cell;
use std::io;

use ast::Body;
use eval::Interpreter;

/// A compiled template.
#[derive(Debug)]
pub struct Template {
    body: Body,
    now: i64,
}

impl Template {
    /// Compiles a template. `now`, in seconds since the Unix epoch, is what `strftime_now` says (in
    /// UTC).
    ///
    /// # Errors
    /// Where it is not Jinja, or uses an unsupported feature.
    pub fn new(source: &str, now: i64) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE {
            return Err(ErrorKind::Limit("has more than 1 MiB").at(1));
        }
        Ok(Self { body: with_stack(|| parser::parse(source)).map_err(no_thread)??, now })
    }

    /// What the template writes with these variables.
    ///
    /// # Errors
    /// What the template itself refuses, and what Python would raise.
    pub fn render<'a>(&self, variables: impl IntoIterator<Item = (&'a str, Value)>) -> Result<Rendered, TemplateError> {
        let interpreter = Interpreter::new(self.now, variables);
        with_stack(|| steps::rendering(|| interpreter.run(&self.body))).map_err(no_thread)?
    }
}

fn no_thread(source: io::Error) -> TemplateError {
    ErrorKind::NoThread(source.to_string()).at(1)
}

/// Bytes of a template. The longest ones have some 30,000.
const MAX_SOURCE: usize = 1 << 20;

/// Fails where the renderings within one [`with_stack`] took all steps that they may.
///
/// # Errors
/// [`ErrorKind::Limit`].
pub fn check_steps() -> Result<(), TemplateError> {
    steps::check_all().map_err(|kind| kind.at(1))
}

/// Draws what reading a text takes from the steps of all renderings within one [`with_stack`].
pub fn charge_bytes(bytes: usize) {
    steps::charge_all(bytes);
}

/// Bytes of stack that a template at its limit of nesting needs, with room: an unoptimised build
/// takes less than half. The system commits only the pages that are touched.
const STACK: usize = 64 << 20;

thread_local! {
    /// Whether this is a thread of [`with_stack`].
    static HAS_STACK: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on a thread of its own, so that the stack of the caller's thread is no limit. Within
/// `work`, this starts no further thread.
///
/// # Errors
/// That of the system, if it starts no thread.
pub fn with_stack<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    with_stack_of(STACK, work)
}

fn with_stack_of<T: Send>(stack: usize, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    if HAS_STACK.get() {
        return Ok(work());
    }
    let work = || {
        HAS_STACK.set(true);
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("template".to_owned()).stack_size(stack);
        let started = thread.spawn_scoped(scope, work)?;
        Ok(started.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
