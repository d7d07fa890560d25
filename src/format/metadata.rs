//! Where a pack came from (spec section 7): small, JSON, and without a time stamp, so that equal input gives equal bytes.

use serde::{Deserialize, Serialize};

/// Provenance of a pack. Unknown keys are ignored when reading.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Program and version that wrote the pack, such as `nf4pack 0.1.0`.
    pub tool: String,
    /// How codes and scales were chosen, such as `mse`.
    pub encoder: String,
    /// `model_type` of the model's configuration.
    pub model_type: String,
    /// Every source file that was read, in the order in which it was read.
    pub sources: Vec<SourceFile>,
    /// Source tensors that were left out, because the pack holds their data under another name or no model uses them.
    #[serde(default)]
    pub dropped: Vec<String>,
}

/// One file of the source checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Plain file name.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 as 64 lowercase hexadecimal digits.
    pub sha256: String,
}

impl Metadata {
    /// The bytes that a pack stores: compact JSON, keys in the order of the fields.
    pub fn to_json(&self) -> Vec<u8> {
        // A struct of strings and integers always serialises; an empty result would be refused by every reader.
        serde_json::to_vec(self).unwrap_or_default()
    }
}
