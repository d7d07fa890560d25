//! What the user should know about a checkpoint that is not an error.

use crate::arch::Naming;

/// Something that was decided about a checkpoint, for the caller to show or to ignore.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The folder holds both weight layouts; the single file is read, as transformers does.
    IndexIgnored,
    /// `lm_head.weight` has the values of a tied model's embedding, so the pack leaves it out.
    TiedHeadDropped,
    /// The options leave nothing to quantise.
    NothingQuantised,
    /// `lm_head.weight` differs from the embedding although config.json ties them; the pack keeps both.
    TiedHeadDiffers,
    /// Names are not those that transformers writes; they are stored as it would have written them.
    Renamed {
        /// How they are read.
        naming: Naming,
    },
    /// Keys of config.json that have no effect.
    IgnoredKeys {
        /// The keys.
        keys: Vec<String>,
    },
    /// The pack is good, but this program cannot train it or generate from it.
    NotRunnable {
        /// Why.
        why: String,
    },
}

impl Notice {
    /// Whether something may be wrong with the checkpoint, rather than only worth a word.
    pub fn is_warning(&self) -> bool {
        match self {
            Self::TiedHeadDiffers | Self::NothingQuantised | Self::IgnoredKeys { .. } | Self::NotRunnable { .. } => true,
            Self::IndexIgnored | Self::TiedHeadDropped | Self::Renamed { .. } => false,
        }
    }
}

impl std::fmt::Display for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = match self {
            Self::Renamed { naming } => return renamed(f, naming),
            Self::IgnoredKeys { keys } => {
                return write!(f, "config.json: {} has no effect, as in transformers", keys.join(", "));
            }
            Self::NotRunnable { why } => {
                return write!(f, "the pack can be verified and exported, but not trained or generated from: {why}");
            }
            Self::IndexIgnored => {
                "model.safetensors and model.safetensors.index.json are both present: model.safetensors is read, as \
                 transformers does, and the index with its shards is ignored"
            }
            Self::TiedHeadDropped => {
                "lm_head.weight has the values of model.embed_tokens.weight and is tied to it (tie_word_embeddings): they \
                 are stored once"
            }
            Self::NothingQuantised => "no tensor is quantised: the pack holds the weights as they are",
            Self::TiedHeadDiffers => {
                "config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight: both are \
                 kept, and lm_head.weight gives the logits, as in transformers 5"
            }
        };
        f.write_str(text)
    }
}

/// What was taken off the names, and what was put before them.
fn renamed(f: &mut std::fmt::Formatter<'_>, naming: &Naming) -> std::fmt::Result {
    let without = naming.wrappers.join(", ");
    match (naming.wrappers.is_empty(), naming.bare) {
        (false, false) => write!(f, "the names of the tensors are stored without {without}"),
        (true, _) => f.write_str("the names of the tensors lack \"model.\": they are stored with it"),
        (false, true) => {
            write!(f, "the names of the tensors are stored without {without}, and with the \"model.\" that they lack")
        }
    }
}
