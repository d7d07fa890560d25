//! Fine-tuning: LoRA adapters on a frozen pack, on any GPU.

pub(crate) mod checkpoint;
pub(crate) mod record;
pub(crate) mod run;
pub(crate) mod schedule;
pub(crate) mod settings;
pub(crate) mod step;
pub(crate) mod trainer;

pub use checkpoint::{Checkpoint, CheckpointError};
pub use record::{METRICS, Record, RecordError, read_metrics};
pub use run::{End, Event, Leftover, Prepared, Run, RunError, Task, check_folder};
pub use schedule::{Shape, Warmup};
pub use settings::Settings;
pub use step::StepResult;
pub use trainer::{Hyperparameters, Trainer};
