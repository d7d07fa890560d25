//! Where a run is, and the file that says so.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::CheckpointError;
use super::fingerprint::Fingerprint;
use crate::format::crc32;
use crate::io::read::{self, Links};

/// The file of the state.
pub const STATE: &str = "trainer_state.json";
/// Bytes that it may have; it has about two thousand.
const MAX_STATE_LEN: u64 = 1 << 20;
/// Its format; a change of its meaning gets another number.
const FORMAT: u32 = 4;

/// Where a run is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Optimiser steps so far.
    pub step: u64,
    /// Optimiser steps of the whole run.
    pub total_steps: u64,
    /// The epoch, from 0.
    pub epoch: u32,
    /// Rows of that epoch that are used.
    pub row: u64,
    /// Forward passes of training so far: the counter of dropout's masks.
    pub micro_batches: u64,
    /// Tokens with a loss so far, in all epochs together.
    #[serde(rename = "trained_tokens")]
    pub loss_tokens: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// The date that chat templates print, in seconds since 1970: it affects the tokens.
    pub now: i64,
    /// The lowest loss of an evaluation so far.
    pub best_eval: Option<f64>,
    /// The step of that evaluation.
    pub best_step: u64,
    /// CRC-32 of that step's adapter, if the folder of the run keeps the best one.
    pub best_adapter: Option<u32>,
    /// Evaluations since then.
    pub evals_without_gain: u32,
    /// Whether this step's evaluation is still due.
    pub eval_due: bool,
    /// The settings and inputs that a resumed run must share.
    pub fingerprint: Fingerprint,
}

impl State {
    /// Before the first step.
    pub fn new(total_steps: u64, now: i64, fingerprint: Fingerprint) -> Self {
        Self {
            step: 0,
            total_steps,
            epoch: 0,
            row: 0,
            micro_batches: 0,
            loss_tokens: 0,
            seconds: 0.0,
            now,
            best_eval: None,
            best_step: 0,
            best_adapter: None,
            evals_without_gain: 0,
            eval_due: false,
            fingerprint,
        }
    }

    /// Step and checksum of the best adapter, if the run keeps it.
    pub fn best_key(&self) -> Option<(u64, u32)> {
        Some((self.best_step, self.best_adapter?))
    }

    /// Makes the present adapter the best one so far; its evaluation is due.
    pub fn forget_best(&mut self) {
        (self.best_eval, self.best_step, self.best_adapter) = (None, self.step, None);
        (self.evals_without_gain, self.eval_due) = (0, true);
    }
}

/// The contents of [`STATE`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile<S> {
    /// First, so that the state of another version is recognised.
    format: u32,
    /// CRC-32 of the adapter's settings and matrices and of both moments: the files belong
    /// together.
    checksum: u32,
    /// CRC-32 of the state, as JSON without spaces.
    state_checksum: u32,
    state: S,
}

/// The part that every format of [`STATE`] has.
#[derive(Deserialize)]
struct AnyState {
    format: u32,
}

/// CRC-32 of a state, as JSON without spaces.
///
/// # Errors
/// Those of serde_json, which no state causes.
pub fn state_checksum(state: &State) -> serde_json::Result<u32> {
    Ok(crc32(&serde_json::to_vec(state)?))
}

/// The file of a checkpoint's state, whose numbers have this checksum.
pub(super) fn state_file(state: &State, checksum: u32) -> serde_json::Result<Vec<u8>> {
    let file = StateFile { format: FORMAT, checksum, state_checksum: state_checksum(state)?, state };
    serde_json::to_vec_pretty(&file)
}

/// Reads the state of a checkpoint, and the checksum of its numbers.
pub(super) fn read_state(folder: &Path) -> Result<(State, u32), CheckpointError> {
    let path = folder.join(STATE);
    let bytes = read::read(&path, Links::Refuse, MAX_STATE_LEN)?;
    let json = |source| CheckpointError::Json { path: path.clone(), source };
    // Another format may differ in everything else.
    let found = serde_json::from_slice::<AnyState>(&bytes).map_err(json)?.format;
    if found != FORMAT {
        return Err(CheckpointError::Format { path, expected: FORMAT, found });
    }
    let StateFile::<State> { checksum, state_checksum: expected, state, .. } =
        serde_json::from_slice(&bytes).map_err(json)?;
    let found = state_checksum(&state).map_err(json)?;
    if found != expected {
        return Err(CheckpointError::StateChecksum { path, expected, found });
    }
    Ok((state, checksum))
}
