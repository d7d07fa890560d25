//! `nf4pack generate`.

use std::io::{self, BufRead, IsTerminal};
use std::ops::ControlFlow;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;

use super::Outcome;
use super::args::GenerateArgs;
use super::device;
use super::ui::{self, Ui};
use crate::dequant::stream::PackSource;
use crate::train::adapter::Adapter;
use crate::train::config::ModelConfig;
use crate::train::data::{Message, Tokenizer};
use crate::train::generate::{Generated, TextGenerator};
use crate::train::model::{read_config, read_tokenizer};
use crate::train::sampling::{Sampler, SamplerOptions};

/// Tokens that a chat remembers where nobody says how many.
const CHAT_CONTEXT: u32 = 4096;
/// How often a wait for a line looks for Ctrl-C.
const PATIENCE: Duration = Duration::from_millis(50);

pub fn run(args: &GenerateArgs) -> Result<Outcome> {
    let ui = Ui::new(args.json);
    ui::handle_interrupts()?;
    // What cannot be is said before a model is loaded.
    let sampler = Sampler::new(SamplerOptions::from(&args.sampling))?;
    let pack = PackSource::open(&args.pack, true)?;
    let config = read_config(&pack)?;
    let tokenizer = read_tokenizer(&pack, &config, now())?;
    let adapter = args.adapter.as_ref().map(|folder| Adapter::read(folder, &config)).transpose()?;
    let prompt = args.prompt.as_ref().map(|text| tokenizer.encode(text, true)).transpose()?;
    let context = args.context.unwrap_or_else(|| context(prompt.as_deref(), args.max_tokens, &config));
    device::with(&args.gpu, ui, |gpu| {
        let (eos, budget) = (tokenizer.eos(), args.vram_budget);
        let generator = TextGenerator::open(gpu, pack, adapter.as_ref(), eos, context, budget)?;
        let mut speaker = Speaker { generator, tokenizer: &tokenizer, sampler, max_tokens: args.max_tokens, ui };
        match prompt {
            Some(prompt) => speaker.go_on(&prompt),
            None => speaker.chat(args.system.as_deref()),
        }
    })?;
    Ok(Outcome::Good)
}

/// Tokens to remember where nobody says how many: all of a prompt, and within what the model was made for.
fn context(prompt: Option<&[u32]>, max_tokens: u32, model: &ModelConfig) -> u32 {
    let most = model.sliding_window.unwrap_or(u32::MAX).min(model.max_position_embeddings);
    let Some(prompt) = prompt else { return CHAT_CONTEXT.min(most) };
    let tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
    tokens.saturating_add(max_tokens).min(most)
}

/// Seconds since 1970, for templates that tell the date.
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed())
}

/// A model that speaks.
struct Speaker<'a> {
    generator: TextGenerator,
    tokenizer: &'a Tokenizer,
    sampler: Sampler,
    max_tokens: u32,
    ui: Ui,
}

/// What was generated, as JSON.
#[derive(Serialize)]
struct Document<'a> {
    text: &'a str,
    tokens: &'a [u32],
    prompt_tokens: u64,
    ending: &'static str,
    prompt_seconds: f64,
    seconds: f64,
    tokens_per_second: f64,
}

impl Speaker<'_> {
    /// Goes on with a text.
    fn go_on(&mut self, prompt: &[u32]) -> Result<()> {
        let (text, generated) = self.answer(prompt, prompt)?;
        let document = Document {
            text: &text,
            tokens: &generated.tokens,
            prompt_tokens: generated.prompt_tokens,
            ending: generated.ending.name(),
            prompt_seconds: generated.prompt_seconds,
            seconds: generated.seconds,
            tokens_per_second: generated.tokens_per_second(),
        };
        // As text it was shown already.
        self.ui.result(&document, || "\n".to_owned())?;
        self.summary(&generated);
        Ok(())
    }

    /// Answers line by line.
    fn chat(&mut self, system: Option<&str>) -> Result<()> {
        let say = |role, content: &str| Message { role, content: content.to_owned() };
        let mut messages: Vec<Message> = system.map(|system| say("system", system)).into_iter().collect();
        let typed = io::stdin().is_terminal();
        let lines = lines();
        while let Some(line) = next_line(&lines, typed)? {
            if line.trim().is_empty() {
                continue;
            }
            messages.push(say("user", &line));
            let prompt = self.tokenizer.chat_prompt(&messages)?;
            let (text, generated) = self.answer(&prompt, &[])?;
            ui::print("\n")?;
            self.summary(&generated);
            messages.push(say("assistant", &text));
            // Ctrl-C ends an answer, and all of it where nobody is there to ask on.
            if ui::take_interrupt() && !typed {
                break;
            }
        }
        Ok(())
    }

    /// Generates after `prompt`, and shows it as it comes, unless JSON is to follow. `shown` is what the text goes on from.
    fn answer(&mut self, prompt: &[u32], shown: &[u32]) -> Result<(String, Generated)> {
        let mut stream = self.tokenizer.stream(shown);
        let (mut text, ui) = (String::new(), self.ui);
        let mut show = |piece: &str| {
            text.push_str(piece);
            ui.stream(piece)
        };
        let generated = self.generator.answer(prompt, self.max_tokens, &mut self.sampler, |token| -> Result<_> {
            show(&stream.push(token)?)?;
            Ok(if ui::interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        show(&stream.finish()?)?;
        Ok((text, generated))
    }

    fn summary(&self, generated: &Generated) {
        let (read, made) = (generated.prompt_tokens, generated.tokens.len() as u64);
        let (prompt, seconds) = (ui::duration(generated.prompt_seconds), ui::duration(generated.seconds));
        let rate = generated.tokens_per_second();
        self.ui.stage(&format!(
            "{} in {seconds}, {rate:.1} tokens/s ({}); {} of prompt in {prompt}",
            ui::plural(made, "token"),
            generated.ending.name(),
            ui::plural(read, "token"),
        ));
    }
}

/// The lines of stdin, read beside what waits for them, since nothing ends a read.
fn lines() -> Receiver<io::Result<String>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || io::stdin().lock().lines().try_for_each(|line| sender.send(line)));
    receiver
}

/// The next line; `None` at their end and at Ctrl-C.
fn next_line(lines: &Receiver<io::Result<String>>, typed: bool) -> Result<Option<String>> {
    if typed {
        ui::prompt("> ");
    }
    loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) => return line.map(Some).context("cannot read stdin"),
            Err(RecvTimeoutError::Timeout) if ui::interrupted() => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}
