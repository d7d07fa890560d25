//! The settings of a training, as names and values: the names are those of the flags.

use crate::data::TrainOn;
use crate::lora::config::TARGETS;
use crate::model::plan::{KeepActivations, MicroBatch, OffloadActivations, OffloadVocabulary};
use crate::train::schedule::{Shape, Warmup};
use crate::train::settings::Settings;

/// All settings except unused ones.
pub(super) fn rows(settings: &Settings) -> Vec<(String, String)> {
    let s = settings;
    let names = || s.targets.iter().map(|role| role.name()).collect::<Vec<_>>().join(", ");
    let every = |steps: Option<u64>| steps.map_or_else(|| "epoch".to_owned(), |steps| format!("{steps} steps"));
    let rows = [
        ("rank", Some(s.rank.to_string())),
        ("alpha", Some(s.alpha.to_string())),
        ("dropout", Some(s.dropout.to_string())),
        ("targets", Some(if s.targets == TARGETS { "all-linear".to_owned() } else { names() })),
        ("rslora", s.rslora.then(|| "on".to_owned())),
        ("lr", Some(s.lr.to_string())),
        ("schedule", Some(shape(s.schedule).to_owned())),
        ("warmup", Some(warmup(s.warmup))),
        ("epochs", s.steps.is_none().then(|| s.epochs.to_string())),
        ("steps", s.steps.map(|steps| steps.to_string())),
        ("micro-batch", Some(micro_batch(s.micro_batch))),
        ("keep-activations", Some(keep_activations(s.keep_activations))),
        ("offload-activations", Some(offload_activations(s.offload_activations).to_owned())),
        ("offload-vocabulary", Some(offload_vocabulary(s.offload_vocabulary).to_owned())),
        ("accumulate", Some(s.accumulate.to_string())),
        ("max-length", Some(s.max_length.to_string())),
        ("clip", Some(s.clip.map_or_else(|| "off".to_owned(), |clip| clip.to_string()))),
        ("weight-decay", Some(s.weight_decay.to_string())),
        ("seed", Some(s.seed.to_string())),
        ("train-on", Some(train_on(s.train_on).to_owned())),
        ("eval-split", Some(s.eval_split.to_string())),
        ("eval-every", Some(every(s.eval_every))),
        ("early-stop", s.early_stop.map(|evaluations| evaluations.to_string())),
        ("save-every", Some(every(s.save_every))),
        ("keep", Some(s.keep.to_string())),
        ("vram-budget", s.vram_budget.map(|bytes| bytes.to_string())),
    ];
    rows.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

fn shape(shape: Shape) -> &'static str {
    match shape {
        Shape::Constant => "constant",
        Shape::Linear => "linear",
        Shape::Cosine => "cosine",
    }
}

fn warmup(warmup: Warmup) -> String {
    match warmup {
        Warmup::Steps(steps) => format!("{steps} steps"),
        Warmup::Fraction(share) => format!("{share} of all steps"),
    }
}

fn micro_batch(micro_batch: MicroBatch) -> String {
    match micro_batch {
        MicroBatch::Auto => "auto".to_owned(),
        MicroBatch::Rows(rows) => rows.to_string(),
    }
}

fn keep_activations(keep: KeepActivations) -> String {
    match keep {
        KeepActivations::Auto => "auto".to_owned(),
        KeepActivations::None => "none".to_owned(),
        KeepActivations::All => "all".to_owned(),
        KeepActivations::Layers(layers) => layers.to_string(),
    }
}

fn offload_activations(offload: OffloadActivations) -> &'static str {
    match offload {
        OffloadActivations::Auto => "auto",
        OffloadActivations::Off => "off",
        OffloadActivations::On => "on",
    }
}

fn offload_vocabulary(offload: OffloadVocabulary) -> &'static str {
    match offload {
        OffloadVocabulary::Auto => "auto",
        OffloadVocabulary::Off => "off",
        OffloadVocabulary::Embedding => "embedding",
        OffloadVocabulary::All => "all",
    }
}

fn train_on(train_on: TrainOn) -> &'static str {
    match train_on {
        TrainOn::Completions => "completions",
        TrainOn::All => "all",
    }
}
