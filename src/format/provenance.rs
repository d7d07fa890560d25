//! The metadata of a pack (spec section 6): where it came from, as JSON.

use serde::{Deserialize, Serialize};

/// How and from what a pack was made. Readers ignore keys that they do not know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// Program and version that wrote the file.
    pub tool: String,
    /// `model_type` of the checkpoint's config.json.
    pub model_type: String,
    /// Whether lm_head is the embedding.
    pub tied_embeddings: bool,
    /// `absmax` or `mse`.
    pub encoder: String,
    /// `f32`, `bf16` or `dq8`.
    pub scales: String,
    /// Weights per block.
    pub block_size: u32,
    /// Regular expression of projections that were kept in their own type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<String>,
    /// Regular expression of further tensors that were quantised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<String>,
    /// Tensors of the source that the pack does not hold: each repeats another, or is no part of
    /// the model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dropped: Vec<String>,
    /// The files that the tensors came from.
    pub sources: Vec<SourceRecord>,
}

/// One source file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// File name, without a folder.
    pub file: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its SHA-256, as 64 lower-case hexadecimal digits.
    pub sha256: String,
}

impl Provenance {
    /// The JSON text of the metadata.
    ///
    /// # Errors
    /// None that this type can cause; serde_json's signature has one.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// Reads the metadata of a pack.
    ///
    /// # Errors
    /// Where it is not JSON or lacks a key.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}
