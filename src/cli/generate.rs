//! `nf4pack generate`.

mod chat;
mod defaults;
mod stop;

use std::cell::Cell;
use std::io::{self, IsTerminal};
use std::ops::ControlFlow;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use super::adapter;
use super::args::GenerateArgs;
use super::device::{self, PrecisionEntry};
use super::model;
use super::open;
use super::outcome::Outcome;
use super::ui::{self, Ui};
use crate::arch::config::ModelConfig;
use crate::data::interruptible::interruptible;
use crate::data::{DataError, Tokenizer};
use crate::model::generate::sampling::Sampler;
use crate::model::generate::{Ending, Event, GenerateError, Generated, TextGenerator};
use crate::model::precision::MixedKernels;
use chat::Conversation;
use stop::Stop;

/// Default context of a chat, in tokens.
const CHAT_CONTEXT: u32 = 4096;

pub fn run(args: &GenerateArgs) -> Result<Outcome> {
    let ui = Ui::new(args.json);
    ui::handle_interrupts()?;
    let pack = open::load(&args.pack, args.load)?;
    let sampler = Sampler::new(defaults::options(&args.sampling, &pack, ui)?)?;
    let config = model::read(&pack, ui)?;
    let tokenizer = Tokenizer::of_pack(&pack, &config, ui::now())?;
    let adapter = adapter::read(args.adapter.as_deref(), &config, ui)?;
    let encode = |text: String| until_interrupt(&tokenizer, move |tokenizer| tokenizer.encode(&text, true));
    let prompt = args.prompt.clone().map(encode).transpose()?;
    let context = args.context.unwrap_or_else(|| context(prompt.as_deref(), args.max_tokens, &config));
    let kernels = MixedKernels::without_training(pack.index(), &config, adapter.as_ref());
    device::with_precision(&args.gpu, args.compute.precision, &kernels, ui, |gpu| {
        let (eos, budget) = (tokenizer.eos(), args.vram_budget);
        let generator = TextGenerator::open(gpu, pack, adapter.as_ref(), eos, context, budget)?;
        let max_tokens = args.max_tokens;
        let (precision, left_out) = (gpu.into(), Vec::new());
        let stop = &args.stop;
        let mut speaker =
            Speaker { generator, tokenizer: &tokenizer, sampler, context, max_tokens, stop, precision, left_out, ui };
        match prompt {
            Some(prompt) => speaker.complete(&prompt),
            None => speaker.chat(args.system.as_deref()),
        }
    })
}

/// Runs work with the tokenizer, which Ctrl-C leaves behind.
fn until_interrupt<T: Send + 'static>(
    tokenizer: &Tokenizer,
    work: impl FnOnce(&Tokenizer) -> Result<T, DataError> + Send + 'static,
) -> Result<T, DataError> {
    let tokenizer = tokenizer.clone();
    interruptible(&mut || !ui::interrupted(), move || work(&tokenizer))
}

/// Default context: the whole prompt, at most the model's maximum.
fn context(prompt: Option<&[u32]>, max_tokens: u32, model: &ModelConfig) -> u32 {
    let max = model.max_position_embeddings;
    let Some(prompt) = prompt else { return CHAT_CONTEXT.min(max) };
    let tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
    tokens.saturating_add(max_tokens).min(max)
}

/// A model that generates text.
struct Speaker<'a> {
    generator: TextGenerator,
    tokenizer: &'a Tokenizer,
    sampler: Sampler,
    /// Tokens of the context.
    context: u32,
    max_tokens: u32,
    /// Strings that end a text.
    stop: &'a [String],
    precision: PrecisionEntry,
    /// The parts that the chat template left out so far.
    left_out: Vec<String>,
    ui: Ui,
}

/// The generated text.
struct Answer {
    text: String,
    generated: Generated,
    /// Whether the reader closed the pipe (`| head`).
    unread: bool,
    /// Whether a stop string ended it.
    at_stop: bool,
}

impl Answer {
    /// Whether Ctrl-C ended it.
    fn interrupted(&self) -> bool {
        self.generated.ending == Ending::Stopped && !self.unread && !self.at_stop
    }

    /// Why the text ended.
    fn ending(&self) -> &'static str {
        if self.at_stop { "stop string" } else { self.generated.ending.name() }
    }

    /// The answer as JSON.
    fn document<'a>(&'a self, precision: &'a PrecisionEntry) -> Document<'a> {
        let generated = &self.generated;
        Document {
            text: &self.text,
            tokens: &generated.tokens,
            prompt_tokens: generated.prompt_tokens,
            ending: self.ending(),
            prompt_seconds: generated.prompt_seconds,
            prompt_tokens_per_second: generated.prompt_tokens_per_second(),
            seconds: generated.seconds,
            tokens_per_second: generated.tokens_per_second(),
            precision,
        }
    }
}

/// The generated text, as JSON.
#[derive(Serialize)]
struct Document<'a> {
    text: &'a str,
    tokens: &'a [u32],
    prompt_tokens: u64,
    ending: &'static str,
    prompt_seconds: f64,
    /// `None` without new tokens in the prompt.
    prompt_tokens_per_second: Option<f64>,
    seconds: f64,
    /// Of the tokens after the first; `None` if there are none.
    tokens_per_second: Option<f64>,
    #[serde(flatten)]
    precision: &'a PrecisionEntry,
}

impl Speaker<'_> {
    /// Continues a text.
    fn complete(&mut self, prompt: &[u32]) -> Result<Outcome> {
        let answer = self.answer(prompt, prompt)?;
        // The text was already streamed.
        self.ui.result(&answer.document(&self.precision), || "\n".to_owned())?;
        self.summary(&answer);
        Ok(Outcome::from(!answer.interrupted()))
    }

    /// Answers line by line.
    fn chat(&mut self, system: Option<&str>) -> Result<Outcome> {
        let mut conversation = Conversation::new(system);
        let (typed, lines) = (io::stdin().is_terminal(), chat::lines()?);
        let mut all_answered = true;
        while let Some(line) = chat::next_question(&lines, typed)? {
            if line.trim().is_empty() {
                continue;
            }
            if let Some(command) = chat::Command::of(&line) {
                self.obey(&command, &mut conversation);
                continue;
            }
            conversation.ask(&line);
            let answer = match self.reply(&mut conversation) {
                Err(error) if is_too_long(&error) => {
                    self.ui.warning(&format!("{error}: the question is dropped"));
                    if self.ui.json_line(&json!({"error": error.to_string()}))?.is_break() {
                        return Ok(Outcome::Good);
                    }
                    conversation.take_back();
                    all_answered = false;
                    continue;
                }
                // On a terminal, Ctrl-C before the first token ends the answer, too.
                Err(error) if typed && matches!(error.downcast_ref(), Some(DataError::Cancelled)) => {
                    conversation.take_back();
                    ui::take_interrupt();
                    continue;
                }
                answer => answer?,
            };
            if answer.unread
                || self.ui.stream("\n")?.is_break()
                || self.ui.json_line(&answer.document(&self.precision))?.is_break()
            {
                return Ok(Outcome::Good);
            }
            self.summary(&answer);
            match answer.text.is_empty() {
                true => conversation.take_back(),
                false => conversation.answer(&answer.text),
            }
            // Ctrl-C ends an answer, and the program if stdin is not a terminal.
            if !typed && ui::interrupted() {
                break;
            }
            ui::take_interrupt();
        }
        Ok(Outcome::from(all_answered && (typed || !ui::interrupted())))
    }

    /// Does what a line of a chat asks of the program itself.
    fn obey(&self, command: &chat::Command<'_>, conversation: &mut Conversation) {
        match *command {
            chat::Command::Clear => {
                conversation.clear();
                self.ui.note("the chat is empty");
            }
            chat::Command::System(text) => {
                conversation.set_system(text);
                self.ui.note("a new chat begins");
            }
            chat::Command::Save("") => self.ui.warning("/save needs the name of a file"),
            chat::Command::Save(path) => match chat::save(path, &conversation.as_sample()) {
                Ok(()) => self.ui.note(&format!("added the chat to {path}")),
                Err(error) => self.ui.warning(&format!("cannot write {path}: {error}")),
            },
            chat::Command::Help => self.ui.block(chat::Command::HELP),
        }
    }

    /// Answers the last question, with the earlier turns that fit.
    fn reply(&mut self, conversation: &mut Conversation) -> Result<Answer> {
        let room = self.max_tokens.min(self.context / 4);
        let [preferred, limit] = [self.context.saturating_sub(room), self.context].map(|tokens| tokens as usize);
        let (prompt, dropped) = conversation.fit(preferred, limit, |messages| {
            let messages = messages.to_vec();
            until_interrupt(self.tokenizer, move |tokenizer| tokenizer.chat_prompt(&messages))
        })?;
        if dropped > 0 {
            let (turns, tokens) = (ui::plural(dropped as u64, "turn"), ui::grouped(self.context.into()));
            self.ui.note(&format!("dropped the oldest {turns} of the chat: the context is {tokens} tokens"));
        }
        let messages = conversation.messages().to_vec();
        for left_out in until_interrupt(self.tokenizer, move |tokenizer| Ok(tokenizer.left_out(&messages)))? {
            if !self.left_out.contains(&left_out) {
                self.ui.warning(&format!("the chat template leaves out {left_out}: the model does not see it"));
                self.left_out.push(left_out);
            }
        }
        self.answer(&prompt, &[])
    }

    /// Generates after `prompt`. Streams the text, unless the output is JSON; `shown` is the text
    /// before it.
    fn answer(&mut self, prompt: &[u32], shown: &[u32]) -> Result<Answer> {
        let mut stream = self.tokenizer.stream(shown);
        let (mut text, unread, ui) = (String::new(), Cell::new(false), self.ui);
        let (mut stop, at_stop) = (Stop::new(self.stop), Cell::new(false));
        let mut show = |piece: &str, last: bool| -> Result<()> {
            let mut piece = stop.push(piece);
            if last {
                piece += &stop.finish();
            }
            at_stop.set(stop.found());
            text.push_str(&piece);
            unread.set(unread.get() | ui.stream(&piece)?.is_break());
            Ok(())
        };
        let generated = self.generator.answer(prompt, self.max_tokens, &mut self.sampler, |event| -> Result<_> {
            if let Event::Token(token) = event {
                show(&stream.push(token)?, false)?;
            }
            let ends = unread.get() || at_stop.get() || ui::interrupted();
            Ok(if ends { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        show(&stream.finish()?, true)?;
        Ok(Answer { text, generated, unread: unread.get(), at_stop: at_stop.get() })
    }

    fn summary(&self, answer: &Answer) {
        let generated = &answer.generated;
        let rate = |rate: Option<f64>| rate.map_or_else(String::new, |rate| format!(", {rate:.1} tokens/s"));
        let part = |what, tokens, seconds| format!("{}{what} in {}", ui::plural(tokens, "token"), ui::duration(seconds));
        self.ui.stage(&format!(
            "{}{} ({}); {}{}",
            part("", generated.tokens.len() as u64, generated.seconds),
            rate(generated.tokens_per_second()),
            answer.ending(),
            part(" of prompt", generated.prompt_tokens, generated.prompt_seconds),
            rate(generated.prompt_tokens_per_second()),
        ));
    }
}

/// Whether a prompt exceeds the context.
fn is_too_long(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(GenerateError::TooLong { .. }))
}
