//! A conversation: its history, and the lines of stdin.

use std::io::{self, BufRead};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cli::ui;
use crate::data::tokenizer::Message;

/// Interval at which a wait for a line checks for Ctrl-C.
const PATIENCE: Duration = Duration::from_millis(50);

/// The history within the context: an optional system prompt, then questions with their answers.
#[derive(Debug, Default)]
pub struct Conversation {
    messages: Vec<Message>,
    /// Messages that are never dropped.
    kept: usize,
}

impl Conversation {
    pub fn new(system: Option<&str>) -> Self {
        let messages: Vec<Message> = system.map(|system| message("system", system)).into_iter().collect();
        Self { kept: messages.len(), messages }
    }

    pub fn ask(&mut self, question: &str) {
        self.messages.push(message("user", question));
    }

    pub fn answer(&mut self, answer: &str) {
        self.messages.push(message("assistant", answer));
    }

    /// The messages of the history.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Drops the last question, which has no answer.
    pub fn take_back(&mut self) {
        self.messages.pop();
    }

    /// Drops the oldest turns (a question and its answer each) until at most `preferred` tokens, by
    /// `tokens_of`, are left, and returns the tokens and the number of dropped turns. The last
    /// question always remains; if it alone exceeds `limit`, nothing is dropped.
    pub fn fit<E>(
        &mut self,
        preferred: usize,
        limit: usize,
        tokens_of: impl Fn(&[Message]) -> Result<Vec<u32>, E>,
    ) -> Result<(Vec<u32>, usize), E> {
        let (kept, turns) = self.messages.split_at(self.kept);
        let mut dropped = 0;
        loop {
            let tokens = tokens_of(&[kept, turns.get(2 * dropped..).unwrap_or_default()].concat())?;
            let last_only = turns.len() <= 2 * dropped + 1;
            if last_only && tokens.len() > limit {
                return Ok((tokens, 0));
            }
            if last_only || tokens.len() <= preferred {
                self.messages.drain(self.kept..self.kept + 2 * dropped);
                return Ok((tokens, dropped));
            }
            dropped += 1;
        }
    }
}

fn message(role: &'static str, content: &str) -> Message {
    Message { role, content: content.to_owned() }
}

/// The lines of stdin, read by a thread, since a read cannot be interrupted.
///
/// # Errors
/// If the system starts no thread.
pub fn lines() -> Result<Receiver<io::Result<String>>> {
    let (sender, receiver) = mpsc::channel();
    let read = move || {
        let _ = io::stdin().lock().lines().try_for_each(|line| sender.send(line));
    };
    thread::Builder::new().name("nf4pack-stdin".to_owned()).spawn(read).context("cannot start a thread")?;
    Ok(receiver)
}

/// The next line; `None` at their end and at Ctrl-C.
pub fn next_line(lines: &Receiver<io::Result<String>>, typed: bool) -> Result<Option<String>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A token for each byte.
    fn tokens(messages: &[Message]) -> Result<Vec<u32>, ()> {
        Ok(messages.iter().flat_map(|m| m.content.bytes().map(u32::from)).collect())
    }

    fn texts(conversation: &Conversation) -> Vec<&str> {
        conversation.messages.iter().map(|m| m.content.as_str()).collect()
    }

    #[test]
    fn the_oldest_turns_go_first_and_the_system_prompt_stays() {
        let mut conversation = Conversation::new(Some("sys"));
        for i in 0..3 {
            conversation.ask(&format!("question {i}"));
            conversation.answer(&format!("answer {i}"));
        }
        conversation.ask("last");
        let (all, dropped) = conversation.fit(1000, 1000, tokens).unwrap();
        assert_eq!((all.len(), dropped), (3 + 3 * 18 + 4, 0));
        let (fitting, dropped) = conversation.fit(3 + 18 + 4, 1000, tokens).unwrap();
        assert_eq!((fitting.len(), dropped), (25, 2));
        assert_eq!(texts(&conversation), ["sys", "question 2", "answer 2", "last"]);
        // The last question remains, although it exceeds the preferred number.
        let (last, dropped) = conversation.fit(2, 7, tokens).unwrap();
        assert_eq!((last.len(), dropped, texts(&conversation)), (7, 1, vec!["sys", "last"]));
        conversation.take_back();
        assert_eq!(texts(&conversation), ["sys"]);
    }

    #[test]
    fn a_question_that_never_fits_costs_nothing() {
        let mut conversation = Conversation::new(Some("sys"));
        conversation.ask("question");
        conversation.answer("answer");
        conversation.ask("far too long");
        let (refused, dropped) = conversation.fit(10, 3 + 12 - 1, tokens).unwrap();
        assert_eq!((refused.len(), dropped), (3 + 12, 0));
        conversation.take_back();
        assert_eq!(texts(&conversation), ["sys", "question", "answer"]);
    }
}
