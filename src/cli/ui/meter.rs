//! Progress on stderr.

use std::fmt;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::door::{one_line, say};
use super::interrupt::interrupted;
use super::numbers::{bytes, count, duration, grouped};
use crate::convert::Progress;

/// What a meter counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Weights,
    Bytes,
    Rows,
    Steps,
}

impl Unit {
    fn amount(self, n: f64) -> String {
        match self {
            Self::Weights => count(n),
            Self::Bytes => bytes(n),
            Self::Rows | Self::Steps => grouped(n as u64),
        }
    }

    /// `None` if the text already has a rate.
    fn rate(self, per_second: f64) -> Option<String> {
        match self {
            Self::Weights => Some(format!("{} weights/s", count(per_second))),
            Self::Bytes => Some(format!("{}/s", bytes(per_second))),
            Self::Rows => Some(format!("{per_second:.1} rows/s")),
            Self::Steps => None,
        }
    }

    /// `189M of 440M weights`
    fn progress(self, done: u64, total: u64) -> String {
        let suffix = match self {
            Self::Weights => " weights",
            Self::Bytes => "",
            Self::Rows => " rows",
            Self::Steps => " steps",
        };
        format!("{} of {}{suffix}", self.amount(done as f64), self.amount(total as f64))
    }
}

/// Progress on stderr: a bar on a terminal, plain lines elsewhere.
#[derive(Debug)]
pub enum Meter {
    Silent,
    Bar(Bar),
    Lines(Lines),
}

impl Meter {
    /// A meter of work whose first `before` units are done.
    pub(super) fn new(verb: &'static str, unit: Unit, before: u64, terminal: bool) -> Self {
        let pace = Pace::after(before);
        if terminal { Self::Bar(Bar::new(verb, unit, pace)) } else { Self::Lines(Lines::new(verb, unit, pace)) }
    }

    /// As [`Progress::advance`], with a text about the last unit.
    pub fn advance_with(&self, done: u64, total: u64, text: &str) {
        match self {
            Self::Silent => {}
            Self::Bar(bar) => bar.advance(done, total, text),
            Self::Lines(lines) => lines.advance(done, total, text),
        }
    }

    /// Prints a separate line, which stays.
    pub fn line(&self, text: &str) {
        let line = || say(&one_line(text));
        match self {
            Self::Silent => {}
            Self::Bar(bar) => bar.bar.suspend(line),
            Self::Lines(_) => line(),
        }
    }
}

impl Progress for Meter {
    fn advance(&self, done: u64, total: u64) {
        self.advance_with(done, total, "");
    }

    fn cancelled(&self) -> bool {
        interrupted()
    }
}

/// The rate: the mean since the first unit was done. Earlier work (headers, a copied embedding,
/// compilation of kernels) would distort it.
#[derive(Debug)]
struct Pace {
    started: Instant,
    /// Units done before the start.
    before: u64,
    first: OnceLock<(Instant, u64)>,
}

impl Pace {
    fn after(before: u64) -> Self {
        Self { started: Instant::now(), before, first: OnceLock::new() }
    }

    fn note(&self, done: u64) {
        if done > self.before {
            self.first.get_or_init(|| (Instant::now(), done));
        }
    }

    /// `None` if nothing was done yet.
    fn per_second(&self, done: u64) -> Option<f64> {
        let since = |at: Instant| at.elapsed().as_secs_f64();
        match self.first.get() {
            _ if done <= self.before => None,
            Some(&(at, first)) if done > first && since(at) > 0.2 => Some((done - first) as f64 / since(at)),
            _ => Some((done - self.before) as f64 / since(self.started).max(1e-9)),
        }
    }
}

/// ` 43 %  189M of 440M weights  92.1M weights/s  3 s left`; unknown parts are left out.
fn status(unit: Unit, done: u64, total: u64, per_second: Option<f64>) -> String {
    let percent = 100.0 * done as f64 / total.max(1) as f64;
    let progress = format!("{percent:3.0} %  {}", unit.progress(done, total));
    let rate = per_second.and_then(|per_second| unit.rate(per_second));
    let left = per_second.and_then(|per_second| time_left(total.saturating_sub(done) as f64 / per_second.max(1e-9)));
    [Some(progress), rate, left].into_iter().flatten().collect::<Vec<_>>().join("  ")
}

/// A bar that redraws itself.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    /// The largest number that a thread reported.
    furthest: Mutex<u64>,
    pace: Arc<Pace>,
    _ticker: Option<Ticker>,
}

impl Bar {
    fn new(verb: &'static str, unit: Unit, pace: Pace) -> Self {
        let template = "{verb} {wide_bar:.green/dim} {state}  {msg}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let pace = Arc::new(pace);
        let shared = Arc::clone(&pace);
        let style = style
            .progress_chars("━╸─")
            .with_key("verb", move |state: &ProgressState, out: &mut dyn fmt::Write| {
                let all = state.len().is_some_and(|total| total > 0 && state.pos() >= total);
                let _ = out.write_str(if all { "finishing" } else { verb });
            })
            .with_key("state", move |state: &ProgressState, out: &mut dyn fmt::Write| {
                // Before the first report the total is not known.
                let Some(total) = state.len() else { return };
                let done = state.pos();
                let _ = out.write_str(&status(unit, done, total, shared.per_second(done)));
            });
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10)).with_style(style);
        bar.set_position(pace.before);
        let (furthest, ticker) = (Mutex::new(pace.before), Ticker::start(&bar));
        Self { bar, furthest, pace, _ticker: ticker }
    }

    fn advance(&self, done: u64, total: u64, text: &str) {
        self.pace.note(done);
        self.bar.set_length(total);
        // Threads report out of order; under a lock, the bar does not go back.
        let mut furthest = self.furthest.lock().unwrap_or_else(PoisonError::into_inner);
        *furthest = done.max(*furthest);
        self.bar.set_position(*furthest);
        drop(furthest);
        if !text.is_empty() {
            self.bar.set_message(one_line(text).into_owned());
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A thread that redraws a bar: without it, the clock stands still while a large tensor is copied.
/// That of indicatif panics where the system starts no thread.
#[derive(Debug)]
struct Ticker {
    /// The thread ends when this is dropped.
    running: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    /// `None` if the system starts no thread.
    fn start(bar: &ProgressBar) -> Option<Self> {
        let (running, end) = mpsc::channel::<()>();
        let bar = bar.downgrade();
        let tick = move || {
            while end.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                bar.upgrade().inspect(ProgressBar::tick);
            }
        };
        let thread = thread::Builder::new().name("nf4pack-progress".to_owned()).spawn(tick).ok()?;
        Some(Self { running: Some(running), thread: Some(thread) })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.running = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The time between two drawings of a bar on which nothing happens.
const TICK: Duration = Duration::from_millis(250);

/// A line for every tenth of the work, with a minimum and a maximum time between lines.
#[derive(Debug)]
pub struct Lines {
    verb: &'static str,
    unit: Unit,
    pace: Pace,
    last: Mutex<(u64, Instant)>,
}

/// The minimum and maximum time between two lines; the end always gets a line.
const LINE_INTERVALS: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

impl Lines {
    fn new(verb: &'static str, unit: Unit, pace: Pace) -> Self {
        Self { verb, unit, pace, last: Mutex::new((0, Instant::now())) }
    }

    fn advance(&self, done: u64, total: u64, text: &str) {
        self.pace.note(done);
        if self.is_due(done, total) {
            say(&one_line(&self.line(done, total, self.pace.per_second(done), text)));
        }
    }

    fn is_due(&self, done: u64, total: u64) -> bool {
        let tenth = (10 * u128::from(done) / u128::from(total.max(1))) as u64;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (last_tenth, at) = *last;
        let (min, max) = LINE_INTERVALS;
        let (later, due) = (tenth > last_tenth, at.elapsed() > if tenth > last_tenth { min } else { max });
        // Threads report out of order; a line never goes back.
        if done == 0 || tenth < last_tenth || !(due || (later && done == total)) {
            return false;
        }
        *last = (tenth, Instant::now());
        true
    }

    fn line(&self, done: u64, total: u64, per_second: Option<f64>, text: &str) -> String {
        let status = status(self.unit, done, total, per_second);
        let gap = if text.is_empty() { "" } else { "  " };
        format!("{}: {status}{gap}{text}", self.verb)
    }
}

/// An estimate of the time left, in seconds at the finest; `None` if it is unknown.
fn time_left(seconds: f64) -> Option<String> {
    match seconds.ceil() {
        s if s < 100.0 => Some(format!("{s:.0} s left")),
        s if s < 1e6 => Some(format!("{} left", duration(s))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long() {
        let lines = |verb, unit| Lines::new(verb, unit, Pace::after(0));
        let line = lines("converting", Unit::Weights).line(50, 200, Some(25.0), "");
        assert_eq!(line, "converting:  25 %  50 of 200 weights  25 weights/s  6 s left");
        let line = lines("training", Unit::Steps).line(5, 20, Some(0.2), "loss 2.5");
        assert_eq!(line, "training:  25 %  5 of 20 steps  75 s left  loss 2.5");
        assert_eq!(lines("training", Unit::Steps).line(0, 20, None, ""), "training:   0 %  0 of 20 steps");
    }

    #[test]
    fn what_was_done_before_says_nothing_about_the_pace() {
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        // 100 steps are old, the next one compiled kernels, and the 10 after it took 200 seconds.
        let resumed = Pace { started: ago(1000), before: 100, first: OnceLock::from((ago(200), 101)) };
        assert_eq!(resumed.per_second(100), None);
        let rate = resumed.per_second(111).unwrap();
        assert!((rate / (10.0 / 200.0) - 1.0).abs() < 0.05, "{rate}");
        let first = resumed.per_second(101).unwrap();
        assert!((first / (1.0 / 1000.0) - 1.0).abs() < 0.05, "{first}");
    }

    #[test]
    fn lines_come_at_each_tenth_and_no_silence_is_long() {
        let lines = Lines::new("training", Unit::Steps, Pace::after(0));
        let since = |tenth: u64, seconds: f64| {
            let at = Instant::now().checked_sub(Duration::from_secs_f64(seconds)).unwrap();
            *lines.last.lock().unwrap() = (tenth, at);
        };
        let due = |seconds, done| {
            since(0, seconds);
            lines.is_due(done, 1000)
        };
        assert!(!due(9.0, 99), "no tenth yet");
        assert!(due(10.1, 99), "but ten seconds");
        assert!(due(0.3, 100) && !due(0.1, 100), "a tenth, unless it was quick");
        assert!(due(0.0, 1000), "the end");
        assert!(!due(100.0, 0), "nothing is done");
    }

    #[test]
    fn threads_that_report_out_of_order_never_move_a_bar_back() {
        const TOTAL: u64 = 2000;
        let (bar, lines) =
            (Bar::new("testing", Unit::Steps, Pace::after(0)), Lines::new("testing", Unit::Steps, Pace::after(0)));
        let (next, due) = (AtomicU64::new(1), AtomicU64::new(0));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let mut furthest = 0;
                    loop {
                        let done = next.fetch_add(1, Ordering::Relaxed);
                        if done > TOTAL {
                            break;
                        }
                        bar.advance(done, TOTAL, "a text");
                        due.fetch_add(u64::from(lines.is_due(done, TOTAL)), Ordering::Relaxed);
                        let position = bar.bar.position();
                        assert!(position >= done.max(furthest), "{position} after {done} and {furthest}");
                        furthest = position;
                    }
                });
            }
        });
        assert_eq!(bar.bar.position(), TOTAL);
        assert!((1..=10).contains(&due.into_inner()), "no more than one line for a tenth, and one at the end");
    }
}
