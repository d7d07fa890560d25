//! What the user should know about a checkpoint that is not an error.

/// Something that was decided about a checkpoint, for the caller to show or to ignore.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The folder holds both weight layouts; the single file is read, as transformers does.
    IndexIgnored,
    /// `lm_head.weight` repeats the embedding of a tied model byte for byte, so the pack leaves it out.
    TiedHeadDropped,
    /// The options leave nothing to quantise.
    NothingQuantised,
    /// `lm_head.weight` differs from the embedding although config.json ties them; the pack keeps both.
    TiedHeadDiffers,
}

impl Notice {
    /// Whether something may be wrong with the checkpoint, rather than only worth a word.
    pub fn is_warning(&self) -> bool {
        matches!(self, Self::TiedHeadDiffers | Self::NothingQuantised)
    }
}

impl std::fmt::Display for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::IndexIgnored => {
                "model.safetensors and model.safetensors.index.json are both present: model.safetensors is read, as \
                 transformers does, and the index with its shards is ignored"
            }
            Self::TiedHeadDropped => {
                "lm_head.weight is identical to model.embed_tokens.weight and tied to it (tie_word_embeddings): it is stored \
                 once"
            }
            Self::NothingQuantised => "no tensor is quantised: the pack holds the weights as they are",
            Self::TiedHeadDiffers => {
                "config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight: both are \
                 kept"
            }
        })
    }
}
