//! The files of a checkpoint that a pack embeds, and their names in it (spec section 7.3).

/// The configuration of the model.
pub const CONFIG: &str = "config.json";

/// The settings of generation, such as the tokens that end a text.
pub const GENERATION_CONFIG: &str = "generation_config.json";

/// The start of a Git LFS pointer: the text that replaces a large file in a repository cloned
/// without Git LFS.
pub const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// The files directly in a checkpoint's folder, under the same name in a pack.
pub const SNAPSHOT_FILES: [&str; 20] = [
    CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    GENERATION_CONFIG,
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer.model.v7",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
];

/// The folder of a checkpoint that has further chat templates, `tool_use.jinja` for one. A pack has
/// no folders: this and a dot stand before the name there.
pub const TEMPLATES_FOLDER: &str = "additional_chat_templates";

/// How the names of templates end.
const TEMPLATE_END: &str = ".jinja";

/// The name in a pack of the file `template` in [`TEMPLATES_FOLDER`]; `None` where it is no
/// template, or a pack cannot have such a name.
pub fn packed_template(template: &str) -> Option<String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let name = template.strip_suffix(TEMPLATE_END)?;
    let fits = !name.is_empty() && !name.starts_with('.') && name.bytes().all(allowed);
    fits.then(|| format!("{TEMPLATES_FOLDER}.{template}"))
}

/// The file name in [`TEMPLATES_FOLDER`] of a pack's file; `None` if it is no such template.
pub fn template_file(packed: &str) -> Option<&str> {
    let template = packed.strip_prefix(TEMPLATES_FOLDER)?.strip_prefix('.')?;
    (packed_template(template).as_deref() == Some(packed)).then_some(template)
}

/// The name of the chat template in a pack's file, such as `tool_use`; `None` if the file is no
/// such template.
pub fn template_name(packed: &str) -> Option<&str> {
    template_file(packed)?.strip_suffix(TEMPLATE_END)
}

/// The folder (`None`: that of the checkpoint itself) and the file name that a pack's file has in a
/// checkpoint; `None` where checkpoints have no such file. A pack of unknown origin must not bring
/// others, code least of all.
pub fn place_of(packed: &str) -> Option<(Option<&'static str>, &str)> {
    match template_file(packed) {
        Some(template) => Some((Some(TEMPLATES_FOLDER), template)),
        None => SNAPSHOT_FILES.contains(&packed).then_some((None, packed)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_have_a_name_in_a_pack_and_back() {
        for template in ["tool_use.jinja", "rag.v2.jinja", "A-1.jinja"] {
            let packed = packed_template(template).unwrap();
            assert_eq!(template_file(&packed), Some(template));
            assert_eq!(template_name(&packed), template.strip_suffix(".jinja"));
            assert_eq!(place_of(&packed), Some((Some(TEMPLATES_FOLDER), template)));
        }
        for other in
            ["tool_use", "tool_use.py", ".jinja", "..jinja", ".hidden.jinja", "a/b.jinja", "a b.jinja", "\u{e9}.jinja", ""]
        {
            assert_eq!(packed_template(other), None, "{other}");
        }
    }

    #[test]
    fn only_the_files_of_checkpoints_have_a_place() {
        assert_eq!(place_of("tokenizer.model"), Some((None, "tokenizer.model")));
        for other in [
            "modeling.py",
            "additional_chat_templates",
            "additional_chat_templates.",
            "additional_chat_templates...jinja",
            "additional_chat_templates.tool_use.py",
            "additional_chat_templates.../x.jinja",
            "model.safetensors",
        ] {
            assert_eq!(place_of(other), None, "{other}");
        }
    }
}
