//! The names of a checkpoint's tensors: what programs put around them, and what stands before the
//! decoder's own.

use super::family::{Family, Scope};

/// How the names of a checkpoint are read. Programs that wrap a model leave their mark in every
/// name, and a model that was saved without its head has no `model.` before them:
/// [`Naming::stored`] gives the name that transformers would have written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Naming {
    /// What was taken off, each once: `module.`, `_orig_mod.`, ...
    pub wrappers: Vec<&'static str>,
    /// Whether the names of the decoder's tensors lack `model.`, which is then put before them.
    pub bare: bool,
}

/// What wrappers put before all of a name.
const OUTER: [&str; 2] = ["module.", "base_model.model."];
/// What wrappers put before any part of a name.
const ANYWHERE: [&str; 3] = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."];

impl Naming {
    /// How these names are read.
    pub fn of<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let (mut wrappers, mut bare, mut prefixed) = (Vec::new(), false, false);
        for name in names {
            let name = unwrap(name, &mut wrappers);
            bare |= in_decoder(&name);
            prefixed |= Prefix::ALL.iter().any(|p| name.strip_prefix(p.decoder).is_some_and(in_decoder));
        }
        wrappers.sort_unstable();
        wrappers.dedup();
        Self { wrappers, bare: bare && !prefixed }
    }

    /// The name under which a pack has the tensor.
    pub fn stored(&self, name: &str) -> String {
        let name = unwrap(name, &mut Vec::new());
        if self.bare && in_decoder(&name) { format!("{}{name}", Prefix::PLAIN.decoder) } else { name }
    }

    /// Whether every name is stored as it stands.
    pub fn is_plain(&self) -> bool {
        self.wrappers.is_empty() && !self.bare
    }
}

/// A name without what wrappers put around it, which is noted in `found`.
fn unwrap(name: &str, found: &mut Vec<&'static str>) -> String {
    let mut rest = name;
    while let Some((wrapper, inner)) =
        OUTER.iter().chain(&ANYWHERE).find_map(|wrapper| Some((*wrapper, rest.strip_prefix(wrapper)?)))
    {
        found.push(wrapper);
        rest = inner;
    }
    let mut name = rest.to_owned();
    for wrapper in ANYWHERE {
        let inside = format!(".{wrapper}");
        if name.contains(&inside) {
            found.push(wrapper);
            name = name.replace(&inside, ".");
        }
    }
    name
}

/// Whether a name without a prefix is that of a tensor of the decoder: it begins as some family's.
fn in_decoder(name: &str) -> bool {
    let parts = || Family::ALL.iter().flat_map(|family| family.parts).filter(|part| part.scope == Scope::Decoder);
    layer_of(name).is_some() || parts().any(|part| part.name == name)
}

/// The layer that a name without a prefix gives, and what follows it; a number that no u64 holds
/// counts as the largest.
pub(super) fn layer_of(name: &str) -> Option<(u64, &str)> {
    let (number, rest) = name.strip_prefix(LAYERS)?.split_once('.')?;
    let canonical =
        !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) && (number == "0" || !number.starts_with('0'));
    canonical.then(|| (number.parse().unwrap_or(u64::MAX), rest))
}

/// Before the number of a layer.
const LAYERS: &str = "layers.";

/// What stands before the names of a model's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// Before those of the decoder.
    pub decoder: &'static str,
    /// Before that of the output projection.
    pub head: &'static str,
}

impl Prefix {
    /// Of a model of text.
    pub const PLAIN: Self = Self { decoder: "model.", head: "" };

    /// Every prefix that is read. The longer ones are those of models of text and images, new and
    /// old.
    pub const ALL: [Self; 3] = [
        Self::PLAIN,
        Self { decoder: "model.language_model.", head: "" },
        Self { decoder: "language_model.model.", head: "language_model." },
    ];

    /// The prefix of a checkpoint: the first one under which the decoder has a tensor.
    pub fn of<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Self {
        let fits = |prefix: &&Self| names.clone().any(|name| name.strip_prefix(prefix.decoder).is_some_and(in_decoder));
        Self::ALL.iter().find(fits).copied().unwrap_or(Self::PLAIN)
    }

    /// The name of a part, in `layer` if it has one.
    pub fn name(&self, scope: Scope, layer: Option<u32>, part: &str) -> String {
        match (scope, layer) {
            (Scope::Model, _) => format!("{}{part}", self.head),
            (Scope::Layer, Some(layer)) => format!("{}{LAYERS}{layer}.{part}", self.decoder),
            _ => format!("{}{part}", self.decoder),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naming(names: &[&str]) -> Naming {
        Naming::of(names.iter().copied())
    }

    #[test]
    fn names_as_transformers_writes_them_stay() {
        for names in [
            ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"],
            ["model.language_model.embed_tokens.weight", "model.visual.module.weight", "lm_head.weight"],
            [
                "language_model.model.layers.3.input_layernorm.weight",
                "vision_tower.layers.0.x",
                "language_model.lm_head.weight",
            ],
        ] {
            let naming = naming(&names);
            assert!(naming.is_plain(), "{naming:?}");
            assert_eq!(names.map(|name| naming.stored(name)), names);
        }
    }

    #[test]
    fn what_wrappers_add_is_taken_off() {
        let stored = "model.layers.1.self_attn.q_proj.weight";
        for (name, wrappers) in [
            ("module.model.layers.1.self_attn.q_proj.weight", &["module."][..]),
            ("_orig_mod.model.layers.1.self_attn.q_proj.weight", &["_orig_mod."]),
            ("module._orig_mod.module.model.layers.1.self_attn.q_proj.weight", &["_orig_mod.", "module."]),
            ("base_model.model.model.layers.1.self_attn.q_proj.weight", &["base_model.model."]),
            ("model._orig_mod.layers.1._orig_mod.self_attn.q_proj.weight", &["_orig_mod."]),
            ("model.layers.1._checkpoint_wrapped_module.self_attn.q_proj.weight", &["_checkpoint_wrapped_module."]),
        ] {
            let naming = naming(&[name]);
            assert_eq!((naming.stored(name).as_str(), naming.bare), (stored, false), "{name}");
            assert_eq!(naming.wrappers, wrappers, "{name}");
        }
    }

    #[test]
    fn names_without_a_prefix_get_one() {
        let names = ["embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight", "lm_head.weight", "score.weight"];
        let naming = naming(&names);
        assert!(naming.bare && naming.wrappers.is_empty());
        let stored = names.map(|name| naming.stored(name));
        let expected = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"];
        assert_eq!(stored[..3], expected);
        assert_eq!(stored[3..], names[3..]);
    }

    #[test]
    fn the_prefix_is_that_of_the_decoder() {
        let of = |names: &[&'static str]| Prefix::of(names.iter().copied()).decoder;
        assert_eq!(of(&["model.embed_tokens.weight"]), "model.");
        assert_eq!(of(&["vision_tower.layers.0.x", "model.language_model.norm.weight"]), "model.language_model.");
        assert_eq!(of(&["language_model.model.layers.0.mlp.up_proj.weight"]), "language_model.model.");
        assert_eq!(of(&["score.weight"]), "model.");
    }
}
