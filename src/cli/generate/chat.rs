//! A conversation: its history, and the lines of stdin.

use std::fs::OpenOptions;
use std::io::{self, BufRead, Write as _};
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

    /// Forgets all turns; the system prompt stays.
    pub fn clear(&mut self) {
        self.messages.truncate(self.kept);
    }

    /// Starts a new chat with this system prompt; an empty one is none.
    pub fn set_system(&mut self, system: &str) {
        *self = Self::new((!system.is_empty()).then_some(system));
    }

    /// The chat as a line of training data.
    pub fn as_sample(&self) -> String {
        let message = |message: &Message| serde_json::json!({"role": message.role, "content": message.content});
        serde_json::json!({"messages": self.messages.iter().map(message).collect::<Vec<_>>()}).to_string()
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

/// What a line of a chat asks of the program itself.
#[derive(Debug, PartialEq, Eq)]
pub enum Command<'a> {
    Clear,
    System(&'a str),
    Save(&'a str),
    Help,
}

impl<'a> Command<'a> {
    /// `None` for a question. A question may begin with a slash, too.
    pub fn of(line: &'a str) -> Option<Self> {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match (word, rest.trim()) {
            ("/clear", "") => Some(Self::Clear),
            ("/system", text) => Some(Self::System(text)),
            ("/save", file) => Some(Self::Save(file)),
            ("/help", "") => Some(Self::Help),
            _ => None,
        }
    }

    pub const HELP: &'static str = "\
/clear         forget the chat, except the system prompt
/system TEXT   start again with this system prompt; without TEXT, with none
/save FILE     add the chat to FILE, as a line that `nf4pack train --data FILE` reads
/help          this list
A line that ends with \\ continues on the next line. Ctrl-C ends an answer, Ctrl-D the chat.";
}

/// Adds a line to a file, which is created if it is missing.
///
/// # Errors
/// If the file cannot be written.
pub fn save(path: &str, line: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(format!("{line}\n").as_bytes())?;
    file.sync_all()
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

/// The next question; `None` at their end and at Ctrl-C. On a terminal, a line that ends with a
/// backslash continues on the next one.
pub fn next_question(lines: &Receiver<io::Result<String>>, typed: bool) -> Result<Option<String>> {
    let mut question = String::new();
    while let Some(line) = next_line(lines, typed.then_some(if question.is_empty() { "> " } else { "... " }))? {
        match line.strip_suffix('\\') {
            Some(line) if typed => question += &format!("{line}\n"),
            _ => return Ok(Some(question + &line)),
        }
    }
    // At Ctrl-C and Ctrl-D, an unfinished question is dropped.
    Ok(None)
}

/// The next line; `None` at their end and at Ctrl-C.
fn next_line(lines: &Receiver<io::Result<String>>, prompt: Option<&str>) -> Result<Option<String>> {
    if let Some(sign) = prompt {
        ui::prompt(sign);
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
    fn commands_begin_with_a_slash_and_a_known_word() {
        assert_eq!(Command::of(" /clear "), Some(Command::Clear));
        assert_eq!(Command::of("/help"), Some(Command::Help));
        assert_eq!(Command::of("/system Be  brief."), Some(Command::System("Be  brief.")));
        assert_eq!(Command::of("/system"), Some(Command::System("")));
        assert_eq!(Command::of("/save my chats.jsonl"), Some(Command::Save("my chats.jsonl")));
        for question in ["/etc/passwd?", "/clearly", "/clear the table", "clear", "What is /help?", "/"] {
            assert_eq!(Command::of(question), None, "{question}");
        }
    }

    #[test]
    fn a_cleared_chat_keeps_its_system_prompt_and_a_saved_one_is_a_sample() {
        let mut conversation = Conversation::new(Some("sys"));
        conversation.ask("q\"1");
        conversation.answer("a\n1");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chats.jsonl");
        for _ in 0..2 {
            save(path.to_str().unwrap(), &conversation.as_sample()).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let samples: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let turn = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
        let messages = [turn("system", "sys"), turn("user", "q\"1"), turn("assistant", "a\n1")];
        assert_eq!(samples, vec![serde_json::json!({"messages": messages}); 2]);
        conversation.clear();
        assert_eq!(texts(&conversation), ["sys"]);
        conversation.ask("next");
        conversation.set_system("other");
        assert_eq!(texts(&conversation), ["other"]);
        conversation.set_system("");
        assert!(texts(&conversation).is_empty());
        assert!(save(folder.path().to_str().unwrap(), "x").is_err());
    }

    #[test]
    fn a_typed_line_continues_after_a_backslash() {
        let question = |typed, texts: &[&str]| {
            let (sender, lines) = mpsc::channel();
            texts.iter().for_each(|&text| sender.send(Ok(text.to_owned())).unwrap());
            drop(sender);
            next_question(&lines, typed).unwrap()
        };
        assert_eq!(question(true, &["one\\", "two\\", "three", "four"]).as_deref(), Some("one\ntwo\nthree"));
        assert_eq!(question(false, &["one\\", "two"]).as_deref(), Some("one\\"));
        assert_eq!(question(true, &["one\\"]), None);
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
