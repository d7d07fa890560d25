//! Why the model of a pack cannot be trained, evaluated or generated from, in sentences.

use crate::arch::{ModelConfig, Obstacle};
use crate::convert::source::CONFIG;
use crate::format::files::GENERATION_CONFIG;
use crate::model::ModelError;
use crate::model::decoder::tokenizer_of;
use crate::{PackSource, ReadError};

/// Why the embedded files of a pack are not enough to train, evaluate and generate, one sentence
/// each. `file` returns the bytes of a file.
pub fn bad_files<'a>(file: impl Fn(&str) -> Option<&'a [u8]>) -> Vec<String> {
    Obstacle::check_files(file).iter().map(unusable).collect()
}

/// Why the model of a pack cannot run, one sentence each. Checks the index, the files, and the
/// tokenizer.
///
/// # Errors
/// If a file cannot be read, or is damaged.
pub fn cannot_run_pack(pack: &PackSource) -> Result<Vec<String>, ReadError> {
    let files = pack.files()?;
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let runnable = Obstacle::check_pack(pack.index(), |name| of_name(&files, name));
    let mut found: Vec<String> = runnable.err().iter().map(unusable).collect();
    found.extend(bad_files(|name| of_name(&files, name)));
    Ok(if found.is_empty() { cannot_load(&files).into_iter().collect() } else { found })
}

/// Why the tokenizer of a pack with these files does not load, if nothing else is wrong with them.
pub fn cannot_load(files: &[(&str, &[u8])]) -> Option<String> {
    let generation = of_name(files, GENERATION_CONFIG);
    let config = ModelConfig::parse(of_name(files, CONFIG)?, generation).map_err(ModelError::from);
    let load = |model: ModelConfig| tokenizer_of(files, &model, 0).map(drop);
    config.and_then(load).err().map(|error| unusable(&error))
}

fn of_name<'a>(files: &[(&str, &'a [u8])], name: &str) -> Option<&'a [u8]> {
    files.iter().find(|(found, _)| *found == name).map(|(_, bytes)| *bytes)
}

fn unusable(reason: &impl std::fmt::Display) -> String {
    format!("train, eval and generate cannot use this pack: {reason}")
}
