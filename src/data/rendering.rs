//! Renderings of a conversation and of its probes.

use std::ops::Range;

use super::jinja::{TemplateError, Value, charge_bytes, check_steps};
use super::probe::{Letters, Plan, Probe, Run, Words};
use super::template::ChatTemplate;

/// A probe takes the time of copying its text that many times.
const PROBED: usize = 4;
/// A message takes the time of so many bytes of text, in addition to its words.
const BYTES_OF_MESSAGE: usize = 64;

/// A conversation, and how it is rendered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rendering<'a> {
    pub(super) template: &'a ChatTemplate,
    pub(super) messages: &'a [Value],
    pub(super) tools: &'a Value,
    pub(super) add_generation_prompt: bool,
}

impl Rendering<'_> {
    pub(super) fn text(&self) -> Result<String, TemplateError> {
        self.template.render(self.messages, self.tools, self.add_generation_prompt)
    }

    /// The probe of a plan and its runs, if its rendering with the letters put back is the text.
    pub(super) fn attempt(&self, plan: &Plan, text: &str) -> Result<(Probe, Vec<Run>), Discarded> {
        // Making and reading a probe takes time, too.
        charge_bytes(PROBED * (text.len() + BYTES_OF_MESSAGE * self.messages.len()));
        check_steps().map_err(|_| Discarded::Stopped)?;
        let probe = Probe::new(self.messages, self.tools, plan, self.template.literals(), text);
        if probe.exhausted {
            return Err(Discarded::Exhausted);
        }
        let rendered = self.template.render(&probe.messages, &probe.tools, self.add_generation_prompt);
        let runs = probe.runs(&rendered.map_err(|_| Discarded::Differs)?, text);
        Ok((probe, runs.ok_or(Discarded::Differs)?))
    }
}

/// Why a probe is discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Discarded {
    /// The template refuses it, or writes another text.
    Differs,
    /// The conversation needs more replacements than there are.
    Exhausted,
    /// The renderings took all steps that they may.
    Stopped,
}

/// The plan that replaces all messages that can be replaced, for a template that changes some of
/// them.
pub(super) fn one_by_one(rendering: Rendering<'_>, text: &str, letters: Letters) -> ((Probe, Vec<Run>), Plan) {
    let messages = vec![Words::Kept; rendering.messages.len()];
    let mut plan = Plan { messages, tools: false, calls: false, keep_literals: true, kept_keys: &[], letters };
    let nothing = Probe::new(rendering.messages, rendering.tools, &plan, rendering.template.literals(), text);
    let mut found = (nothing, Vec::new());
    // Halves of the messages, then halves of those that cannot be replaced at once: most can.
    let mut ranges: Vec<Range<usize>> = std::iter::once(0..rendering.messages.len()).collect();
    while let Some(range) = ranges.pop() {
        let mut next = plan.clone();
        next.messages.get_mut(range.clone()).into_iter().flatten().for_each(|words| *words = Words::Replaced);
        match rendering.attempt(&next, text) {
            Ok(probe) => (found, plan) = (probe, next),
            Err(Discarded::Exhausted | Discarded::Differs) if range.len() > 1 => {
                let middle = range.start + range.len() / 2;
                ranges.extend([middle..range.end, range.start..middle]);
            }
            // No letters or no steps are left for the messages after this one.
            Err(Discarded::Exhausted | Discarded::Stopped) => break,
            Err(Discarded::Differs) => {}
        }
    }
    for next in [Plan { tools: true, ..plan.clone() }, Plan { calls: true, ..plan.clone() }] {
        if let Ok(probe) = rendering.attempt(&next, text) {
            (found, plan) = (probe, next);
        }
    }
    (found, plan)
}
