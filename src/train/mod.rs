//! Fine-tuning: LoRA adapters on a frozen pack, on any GPU.

pub(crate) mod checkpoint;
#[cfg(test)]
mod fuzz_regressions;
pub(crate) mod record;
pub(crate) mod run;
pub(crate) mod schedule;
pub(crate) mod settings;
pub(crate) mod step;
pub(crate) mod trainer;

/// What the fuzz targets call below the public API.
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzzing {
    pub use super::checkpoint::{Checkpoint, Fingerprint, OPTIMIZER, STATE, State};
    pub use super::record::{METRICS, read_metrics};
}

pub use checkpoint::{CheckpointError, Difference};
pub use record::{EvalRecord, RecordError, StepRecord};
pub use run::{End, Event, Leftover, Prepared, Run, RunError, Task};
pub use schedule::{Shape, Warmup};
pub use settings::{Settings, SettingsError};
