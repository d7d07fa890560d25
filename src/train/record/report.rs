//! The report: one file of HTML.

use super::Record;

/// What a report says.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Its title.
    pub title: String,
    /// Names and values of the settings, in order.
    pub settings: Vec<(String, String)>,
    /// Names and values of what else is known: model, device, data, memory.
    pub facts: Vec<(String, String)>,
    /// All records, in order.
    pub records: Vec<Record>,
    /// What the trained model writes, if it was asked.
    pub sample: Option<Sample>,
}

/// Text that the trained model wrote.
#[derive(Debug, Clone)]
pub struct Sample {
    /// What it was given.
    pub prompt: String,
    /// What it wrote.
    pub completion: String,
}

/// The report as one HTML file that needs nothing else.
pub fn report(report: &Report) -> String {
    report.title.clone()
}
