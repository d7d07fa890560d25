//! Fine-tuning: LoRA adapters on a frozen pack, on any GPU.

pub(crate) mod best;
pub(crate) mod checkpoint;
pub(crate) mod record;
pub(crate) mod run;
pub(crate) mod schedule;
pub(crate) mod settings;
pub(crate) mod step;
pub(crate) mod trainer;

pub use checkpoint::{CheckpointError, Difference};
pub use record::RecordError;
pub use run::{End, Leftover, Prepared, Run, RunError, Task};
pub use settings::{Settings, SettingsError};

/// What a run reports.
pub mod events {
    pub use super::record::{EvalRecord, StepRecord};
    pub use super::run::Event;
}

/// The learning rate over the steps.
pub mod learning_rate {
    pub use super::schedule::{Shape, Warmup};
}
