//! The first pass over a file of JSON Lines: every line is read, none is tokenised. So a broken
//! line is reported before the hours that tokenising may take.

use std::io::Read;

use rayon::prelude::*;

use super::error::DataError;
use super::form::Form;
use super::formats::{UnknownKeys, form_of, parse};
use super::interruptible::interruptible;
use super::keys::KeyCounts;
use super::lines::{Line, Lines};

/// Lines that are read between two calls of `progress`: enough for all cores, and done in a moment.
pub(super) const AT_A_TIME: usize = 512;

/// What the lines of a file have.
#[derive(Debug)]
pub(super) struct Survey {
    /// The form of all lines, which the first one has.
    pub(super) form: Form,
    /// Lines that are not blank.
    pub(super) count: u64,
    /// Keys of no known meaning, of lines and of messages.
    pub(super) ignored: KeyCounts,
}

/// The keys of a line of no known meaning, and those of its messages.
type Keys = (Vec<String>, UnknownKeys);

impl Survey {
    /// Reads every line. `may_read` says of a key of messages whether a chat template may read it.
    /// `progress` gets 0 and the number of lines so far; it stops the work by returning `false`.
    ///
    /// # Errors
    /// A [`DataError`] of the first line that is broken; [`DataError::Empty`];
    /// [`DataError::Cancelled`].
    pub(super) fn of(
        lines: &mut Lines<impl Read>,
        may_read: impl Fn(&str) -> bool,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Self, DataError> {
        let mut survey: Option<Self> = None;
        while let Some(some) = lines.read(AT_A_TIME)? {
            if let Some(first) = some.first() {
                let survey = match &mut survey {
                    Some(survey) => survey,
                    none => none.insert(Self::new(form_of(first)?)),
                };
                survey.add(some, &may_read, progress)?;
            }
            if !progress(0, survey.as_ref().map_or(0, |survey| survey.count)) {
                return Err(DataError::Cancelled);
            }
        }
        survey.ok_or(DataError::Empty)
    }

    fn new(form: Form) -> Self {
        Self { form, count: 0, ignored: KeyCounts::default() }
    }

    /// Reads some lines, on all cores.
    fn add(
        &mut self,
        lines: Vec<Line>,
        may_read: impl Fn(&str) -> bool,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<(), DataError> {
        let (form, before) = (self.form, self.count);
        self.count += lines.len() as u64;
        let keys = move |line: Line| -> Result<Keys, DataError> {
            let parsed = parse(&line, form)?;
            Ok((parsed.ignored, parsed.ignored_of_messages))
        };
        let work = move || Ok(lines.into_par_iter().map(keys).collect::<Vec<_>>());
        // In their order, so that the first broken line is reported.
        for keys in interruptible(&mut || progress(0, before), work)? {
            let (ignored, of_messages) = keys?;
            let unread = of_messages.iter().filter(|key| !may_read(key));
            ignored.iter().chain(unread).for_each(|key| self.ignored.add(key));
        }
        Ok(())
    }
}
