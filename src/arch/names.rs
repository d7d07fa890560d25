//! The names of a checkpoint's tensors: the prefixes that programs add, and those of the decoder.

use std::collections::{BTreeMap, HashSet};

use super::family::{Family, Scope};
use crate::format::Role;

/// The differences of a checkpoint's names from those that transformers writes. Programs that wrap
/// a model add a prefix to every name. A model that was saved without its head lacks `model.`. Some
/// programs write another word in its place. [`Naming::stored`] gives the name that transformers
/// writes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Naming {
    /// The prefixes that are removed, each once: `module.`, `_orig_mod.`, ...
    pub wrappers: Vec<String>,
    /// The text in place of the decoder's `model.`: empty, or another word.
    pub replaced: Option<String>,
    /// Whether the output projection has the decoder's prefix.
    pub head_inside: bool,
}

/// The prefixes that wrappers add to a whole name.
const OUTER: [&str; 2] = ["module.", "base_model.model."];
/// The prefixes that wrappers add to any component of a name.
const ANYWHERE: [&str; 3] = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."];

impl Naming {
    /// The differences of these names.
    pub fn of<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let mut wrappers = Vec::new();
        let names: HashSet<String> = names.map(|name| unwrap(name, &mut wrappers)).collect();
        let mut wrappers: Vec<String> = wrappers.into_iter().map(str::to_owned).collect();
        let mut replaced = None;
        match found_prefix(&names) {
            Found::Known => {}
            Found::Behind(wrapper) => wrappers.push(wrapper),
            Found::InPlace(prefix) => replaced = Some(prefix),
        }
        wrappers.sort_unstable();
        wrappers.dedup();
        let mut naming = Self { wrappers, replaced, head_inside: false };
        let stored: HashSet<String> = names.iter().map(|name| naming.stored(name)).collect();
        naming.head_inside = heads().any(|head| {
            let inside = format!("{}{head}", Prefix::PLAIN.decoder);
            stored.contains(&inside) && !stored.contains(head)
        });
        naming
    }

    /// The name of the tensor in a pack.
    pub fn stored(&self, name: &str) -> String {
        let name = unwrap(name, &mut Vec::new());
        let name = self.wrappers.iter().find_map(|wrapper| name.strip_prefix(wrapper.as_str())).unwrap_or(&name);
        let rest = self.replaced.as_deref().and_then(|prefix| name.strip_prefix(prefix));
        let in_place = |rest: &str| in_decoder(rest) || (self.replaced.as_deref() != Some("") && is_head(rest));
        let name = match rest.filter(|rest| in_place(rest)) {
            Some(rest) => format!("{}{rest}", Prefix::PLAIN.decoder),
            None => name.to_owned(),
        };
        let head = name.strip_prefix(Prefix::PLAIN.decoder).filter(|rest| self.head_inside && is_head(rest));
        head.map(str::to_owned).unwrap_or(name)
    }
}

/// The prefix of a decoder's tensors.
enum Found {
    /// A prefix that transformers writes, or there is no decoder.
    Known,
    /// Such a prefix after this wrapper's.
    Behind(String),
    /// This, in place of such a prefix.
    InPlace(String),
}

/// Looks for the decoder among the names.
fn found_prefix(names: &HashSet<String>) -> Found {
    let mut prefixes: BTreeMap<&str, Seen> = BTreeMap::new();
    for (prefix, rest) in names.iter().filter_map(|name| split(name)) {
        let seen = prefixes.entry(prefix).or_default();
        seen.layers |= layer_of(rest).is_some();
        seen.embedding |= names_of(Role::Embedding).any(|embedding| rest == embedding);
    }
    let is_known = |prefix: &str| Prefix::ALL.iter().any(|known| known.decoder == prefix);
    let has_known = prefixes.keys().any(|prefix| is_known(prefix));
    // As in transformers if some names have the prefix and others lack it.
    let lacks_it = |name: &String| !names.contains(&format!("{}{name}", Prefix::PLAIN.decoder));
    let mut bare = names.iter().filter(|name| in_decoder(name)).peekable();
    let only_plain = prefixes.keys().all(|prefix| !is_known(prefix) || *prefix == Prefix::PLAIN.decoder);
    if only_plain && bare.peek().is_some() && bare.all(lacks_it) {
        return Found::InPlace(String::new());
    }
    if has_known {
        return Found::Known;
    }
    // A vision tower has layers, too, but no embedding of tokens; an adapter has none at all.
    let with_embedding = prefixes.values().any(|seen| seen.embedding);
    let decoders: Vec<&str> = prefixes
        .iter()
        .filter(|(_, seen)| seen.layers && seen.embedding == with_embedding)
        .map(|(prefix, _)| *prefix)
        .collect();
    let [prefix] = decoders[..] else { return Found::Known };
    let behind = |known: &Prefix| prefix.strip_suffix(known.decoder).filter(|wrapper| wrapper.ends_with('.'));
    match Prefix::ALL.iter().rev().find_map(behind) {
        Some(wrapper) => Found::Behind(wrapper.to_owned()),
        None => Found::InPlace(prefix.to_owned()),
    }
}

/// The names of a decoder after a prefix.
#[derive(Default)]
struct Seen {
    layers: bool,
    embedding: bool,
}

/// The prefix before the decoder's own name of a tensor, and that name.
fn split(name: &str) -> Option<(&str, &str)> {
    let dots = name.match_indices('.').map(|(at, _)| at + 1);
    std::iter::once(0).chain(dots).map(|at| name.split_at(at)).find(|(_, rest)| in_decoder(rest))
}

/// The names of parts outside the decoder: the output projection.
fn heads() -> impl Iterator<Item = &'static str> {
    let parts = Family::ALL.iter().flat_map(|family| family.parts);
    parts.filter(|part| part.scope == Scope::Model).map(|part| part.name)
}

/// The names of the parts with this role in all families, without a prefix.
fn names_of(role: Role) -> impl Iterator<Item = &'static str> {
    Family::ALL.iter().filter_map(move |family| family.part(role)).map(|part| part.name)
}

/// Whether a name contains the module of the parts with this role: `lm_head` of `lm_head.weight`.
pub fn has_module_of(name: &str, role: Role) -> bool {
    let module_of = |part: &'static str| part.rsplit_once('.').map(|(module, _)| module);
    names_of(role).filter_map(module_of).any(|module| name.split('.').any(|word| word == module))
}

/// Whether a name is, with some prefix, that of a part with this role outside the layers.
#[cfg(feature = "cli")]
pub fn is_part(name: &str, role: Role) -> bool {
    let mut parts = Prefix::ALL.iter().flat_map(|prefix| Family::ALL.iter().map(move |family| prefix.part(family, role)));
    parts.any(|part| part.as_deref() == Some(name))
}

fn is_head(name: &str) -> bool {
    heads().any(|head| head == name)
}

/// A name without the prefixes of wrappers, which are added to `found`.
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

/// The text before the number of a layer.
const LAYERS: &str = "layers.";

/// The prefixes of the names of a model's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// That of the decoder.
    pub decoder: &'static str,
    /// That of the output projection.
    pub head: &'static str,
}

impl Prefix {
    /// The prefixes of a model of text.
    pub const PLAIN: Self = Self { decoder: "model.", head: "" };

    /// Every supported prefix. The longer ones are those of models of text and images, new and old.
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

    /// The name of a family's part with this role, which is not in a layer.
    #[cfg(feature = "convert")]
    pub fn part(&self, family: &Family, role: Role) -> Option<String> {
        family.part(role).map(|part| self.name(part.scope, None, part.name))
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
            assert_eq!(naming, Naming::default());
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
            assert_eq!((naming.stored(name).as_str(), naming.replaced.as_deref()), (stored, None), "{name}");
            assert_eq!(naming.wrappers, wrappers, "{name}");
        }
    }

    #[test]
    fn names_without_a_prefix_get_one() {
        let names = ["embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight", "lm_head.weight", "score.weight"];
        let naming = naming(&names);
        assert!(naming.replaced.as_deref() == Some("") && naming.wrappers.is_empty());
        let stored = names.map(|name| naming.stored(name));
        let expected = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"];
        assert_eq!(stored[..3], expected);
        assert_eq!(stored[3..], names[3..]);
    }

    /// The stored names of a decoder whose names are `names`, one line each: how they are read.
    fn read(names: &[&str]) -> (Vec<String>, Vec<String>, Option<String>) {
        let naming = naming(names);
        (names.iter().map(|name| naming.stored(name)).collect(), naming.wrappers, naming.replaced)
    }

    const STORED: [&str; 3] = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"];

    #[test]
    fn any_single_word_before_the_names_is_taken_off() {
        for wrapper in ["model.", "transformer.", "student.", "actor.module2."] {
            let names = STORED.map(|name| format!("{wrapper}{name}"));
            let names: Vec<&str> = names.iter().map(String::as_str).chain(["vision.layers.0.x.weight"]).collect();
            let (stored, wrappers, replaced) = read(&names);
            assert_eq!((&stored[..3], replaced), (&STORED.map(str::to_owned)[..], None), "{wrapper}");
            assert_eq!((wrappers, stored[3].as_str()), (vec![wrapper.to_owned()], "vision.layers.0.x.weight"));
        }
        let (stored, wrappers, _) = read(&["llm.language_model.model.layers.0.x", "llm.language_model.lm_head.weight"]);
        assert_eq!(stored, ["language_model.model.layers.0.x", "language_model.lm_head.weight"]);
        assert_eq!(wrappers, ["llm."]);
    }

    #[test]
    fn another_word_in_place_of_the_prefix_is_replaced() {
        for word in ["transformer.", "text_model.", "model.decoder.", "language_model."] {
            let names = STORED.map(|name| name.replace("model.", word));
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            assert_eq!(read(&names), (STORED.map(str::to_owned).to_vec(), vec![], Some(word.to_owned())));
        }
        let (stored, _, replaced) =
            read(&["text.embed_tokens.weight", "text.layers.0.mlp.up_proj.weight", "text.lm_head.weight"]);
        assert_eq!((stored, replaced.as_deref()), (STORED.map(str::to_owned).to_vec(), Some("text.")));
    }

    #[test]
    fn two_decoders_or_none_leave_the_names_as_they_are() {
        let two = ["a.layers.0.x", "a.embed_tokens.weight", "b.layers.0.x", "b.embed_tokens.weight"];
        assert_eq!(naming(&two), Naming::default());
        assert_eq!(naming(&["a.layers.0.x", "b.layers.0.x"]), Naming::default());
        assert_eq!(naming(&["x", "vision.norm.weight"]), Naming::default());
    }

    #[test]
    fn some_names_may_lack_the_prefix_and_the_head_may_have_it() {
        let names = ["layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.lm_head.weight"];
        let (stored, _, _) = read(&names);
        assert_eq!(stored, [STORED[1], STORED[0], STORED[2]]);
        // Both names of one tensor are no such case.
        let twice = ["layers.0.x", "model.layers.0.x", "model.lm_head.weight", "lm_head.weight"];
        assert_eq!(naming(&twice), Naming::default());
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
