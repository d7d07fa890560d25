//! What the user should know about a checkpoint that is not an error.

use crate::arch::names::Naming;

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
    /// `lm_head.weight` differs from the embedding although config.json ties them; the pack keeps
    /// both.
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
    /// There is no index; the shards are all there, by their names.
    NoIndex {
        /// Number of shards.
        shards: usize,
    },
    /// Index and shards do not agree; the shards decide, as in transformers.
    IndexDiffers {
        /// What the index lists, and no shard has.
        absent: Vec<String>,
        /// What a shard has, and the index does not list.
        unlisted: Vec<String>,
        /// What another shard has than the index says.
        elsewhere: Vec<String>,
    },
    /// config.json speaks of a quantisation, but the weights have none.
    QuantisationIgnored {
        /// The method that config.json names.
        method: String,
    },
    /// No tokenizer.json, but a file that it can be made of.
    NoTokenizer {
        /// The file.
        other: &'static str,
    },
    /// Files without content, which a pack does not store.
    EmptyFiles {
        /// Their names in the checkpoint.
        files: Vec<String>,
    },
    /// generation_config.json is not JSON.
    GenerationConfigIgnored {
        /// What is wrong with it.
        why: String,
    },
    /// Tensors that several shards hold with the same values.
    Copies {
        /// Their names.
        tensors: Vec<String>,
    },
    /// Files whose names a pack cannot have.
    FilesLeftOut {
        /// Their names in the checkpoint.
        files: Vec<String>,
    },
    /// Tensors that are no part of the model, and are not stored.
    LeftOut {
        /// Each with the reason.
        tensors: Vec<LeftOut>,
    },
    /// Tensors that are no part of the model, and are stored all the same, as they are.
    KeptUnused {
        /// Their names.
        tensors: Vec<String>,
    },
    /// Tensors like parts of the model, which it does not have by config.json. They are stored as
    /// they are and not used.
    Unexpected {
        /// Their names.
        tensors: Vec<String>,
    },
    /// Tensors of layers that the model does not have by config.json, and that are no layers for
    /// multi-token prediction, as far as can be seen. They are not stored.
    BeyondLayers {
        /// Layers by config.json.
        layers: u32,
        /// Their names.
        tensors: Vec<String>,
    },
}

/// A tensor that is not stored.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LeftOut {
    /// Its name in the checkpoint.
    pub name: String,
    /// Why.
    pub why: String,
}

impl LeftOut {
    pub(super) fn new(name: String, why: &str) -> Self {
        Self { name, why: why.to_owned() }
    }
}

impl Notice {
    /// Whether something may be wrong with the checkpoint, rather than only worth a word.
    pub fn is_warning(&self) -> bool {
        match self {
            Self::TiedHeadDiffers
            | Self::NothingQuantised
            | Self::IgnoredKeys { .. }
            | Self::NotRunnable { .. }
            | Self::FilesLeftOut { .. }
            | Self::EmptyFiles { .. }
            | Self::GenerationConfigIgnored { .. }
            | Self::Unexpected { .. }
            | Self::BeyondLayers { .. } => true,
            Self::IndexIgnored
            | Self::TiedHeadDropped
            | Self::Renamed { .. }
            | Self::NoIndex { .. }
            | Self::NoTokenizer { .. }
            | Self::IndexDiffers { .. }
            | Self::Copies { .. }
            | Self::QuantisationIgnored { .. }
            | Self::LeftOut { .. }
            | Self::KeptUnused { .. } => false,
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
            Self::NoIndex { shards } => {
                return write!(f, "there is no model.safetensors.index.json: all {shards} shards are read, by their names");
            }
            Self::IndexDiffers { absent, unlisted, elsewhere } => return index_differs(f, absent, unlisted, elsewhere),
            Self::QuantisationIgnored { method } => {
                return write!(
                    f,
                    "config.json has a quantization_config of the method {method:?}, but the weights are not quantised: it is \
                     not followed, and an export leaves it out"
                );
            }
            Self::NoTokenizer { other } => {
                return write!(
                    f,
                    "tokenizer.json can be made of {other}: AutoTokenizer.from_pretrained(SRC).save_pretrained(SRC) in Python; a \
                     snapshot exported from the pack has none, either"
                );
            }
            Self::EmptyFiles { files } => {
                return write!(f, "files without content are left out (download them again): {}", Names(files));
            }
            Self::GenerationConfigIgnored { why } => {
                return write!(
                    f,
                    "generation_config.json is not JSON ({why}): it is ignored, as in transformers, and config.json alone \
                     says which tokens end a text"
                );
            }
            Self::Copies { tensors } => {
                return write!(f, "in several shards with the same values, and stored once: {}", Names(tensors));
            }
            Self::FilesLeftOut { files } => {
                return write!(f, "a pack cannot have files of these names, which are left out: {}", Names(files));
            }
            Self::LeftOut { tensors } => return left_out(f, tensors),
            Self::KeptUnused { tensors } => {
                return write!(f, "no part of the model, and kept as they are: {}", Names(tensors));
            }
            Self::Unexpected { tensors } => {
                return write!(
                    f,
                    "the model has no such tensors by config.json: they are kept as they are and not used, as transformers \
                     does not use them: {}",
                    Names(tensors)
                );
            }
            Self::BeyondLayers { layers, tensors } => {
                return write!(
                    f,
                    "the model has {layers} layers by config.json: tensors of further layers are left out, as transformers \
                     does: {}",
                    Names(tensors)
                );
            }
        };
        f.write_str(text)
    }
}

/// What was taken off the names, and what was put before them.
fn renamed(f: &mut std::fmt::Formatter<'_>, naming: &Naming) -> std::fmt::Result {
    let replaced = naming.replaced.as_deref();
    let parts = [
        (!naming.wrappers.is_empty()).then(|| format!("without {}", naming.wrappers.join(", "))),
        replaced.filter(|prefix| prefix.is_empty()).map(|_| "with the \"model.\" that they lack".to_owned()),
        replaced.filter(|prefix| !prefix.is_empty()).map(|prefix| format!("with \"model.\" in place of {prefix:?}")),
        naming.head_inside.then(|| "with lm_head.weight outside of the decoder".to_owned()),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    write!(f, "the names of the tensors are stored {}", parts.join(", "))
}

/// Names that a note shows of many.
const SHOWN: usize = 4;

/// The first names of a list, and how many more there are.
struct Names<'a>(&'a [String]);

impl std::fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown: Vec<String> = self.0.iter().take(SHOWN).map(|name| name.escape_debug().to_string()).collect();
        f.write_str(&shown.join(", "))?;
        and_more(f, self.0.len())
    }
}

fn and_more(f: &mut std::fmt::Formatter<'_>, all: usize) -> std::fmt::Result {
    match all.saturating_sub(SHOWN) {
        0 => Ok(()),
        more => write!(f, " and {more} more"),
    }
}

fn left_out(f: &mut std::fmt::Formatter<'_>, tensors: &[LeftOut]) -> std::fmt::Result {
    f.write_str("no part of the model, and left out: ")?;
    let one = |tensor: &LeftOut| format!("{} ({})", tensor.name.escape_debug(), tensor.why);
    f.write_str(&tensors.iter().take(SHOWN).map(one).collect::<Vec<_>>().join(", "))?;
    and_more(f, tensors.len())
}

fn index_differs(
    f: &mut std::fmt::Formatter<'_>,
    absent: &[String],
    unlisted: &[String],
    elsewhere: &[String],
) -> std::fmt::Result {
    f.write_str("model.safetensors.index.json and the shards differ, and the shards decide, as in transformers")?;
    for (what, names) in
        [("listed, but in no shard", absent), ("not listed", unlisted), ("in another shard than listed", elsewhere)]
    {
        if !names.is_empty() {
            write!(f, "; {what}: {}", Names(names))?;
        }
    }
    Ok(())
}
