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
pub use record::{EvalRecord, RecordError, StepRecord};
pub use run::{End, Event, Leftover, Prepared, Run, RunError, Task};
pub use schedule::{Shape, Warmup};
pub use settings::{Settings, SettingsError};
