//! What other programs want beside an adapter: the tokenizer, the chat template, a model card.

use std::path::Path;

use crate::format::files::{CONFIG, GENERATION_CONFIG, SNAPSHOT_FILES};
use crate::{PackSource, ReadError};

/// The name of a model card on the hub.
const CARD: &str = "README.md";

/// The files of the tokenizer in `pack`, with their names, and a model card. What is in `out`
/// already stays, so a resumed run adds nothing.
///
/// # Errors
/// If the pack cannot be read.
pub fn files(pack: &PackSource, out: &Path, base: Option<&str>) -> Result<Vec<(String, Vec<u8>)>, ReadError> {
    let is_new = |name: &&str| !out.join(name).exists();
    // The settings of the model are those of its base.
    let of_tokenizer = SNAPSHOT_FILES.into_iter().filter(|&name| ![CONFIG, GENERATION_CONFIG].contains(&name));
    let mut files = Vec::new();
    for name in of_tokenizer.filter(is_new) {
        files.extend(pack.file(name)?.map(|bytes| (name.to_owned(), bytes)));
    }
    files.extend(Some(CARD).filter(is_new).map(|name| (name.to_owned(), card(base).into_bytes())));
    Ok(files)
}

/// The model card, in the form of PEFT's. `base` is the name of the base model.
fn card(base: Option<&str>) -> String {
    let key = base.map_or_else(String::new, |base| format!("base_model: {}\n", serde_json::json!(base)));
    format!(
        "---\n{key}library_name: peft\ntags:\n- lora\n- nf4pack\n---\n\n# A LoRA adapter\n\nTrained with nf4pack {} on 4-bit \
         weights. PEFT loads this folder on top of the base model, and `nf4pack generate PACK --adapter FOLDER` on top of its \
         pack. `nf4pack-train.toml` has the settings of the training, and `report.html` its losses.\n",
        env!("CARGO_PKG_VERSION")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::{Options, convert};

    #[test]
    fn an_adapter_gets_the_tokenizer_and_a_card_but_nothing_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let tiny = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-qwen3"));
        let path = folder.path().join("tiny.nf4pack");
        let absmax = Options { encoder: crate::convert::encode::Encoder::Absmax, ..Options::default() };
        convert(tiny, &path, absmax, &()).unwrap();
        let pack = PackSource::open(&path).unwrap();
        let out = folder.path().join("out");
        let found = files(&pack, &out, Some("a \"model\"")).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let (_, bytes) = found.iter().find(|(found, _)| found == name).unwrap();
            assert_eq!(bytes, &std::fs::read(tiny.join(name)).unwrap());
        }
        assert!(found.iter().all(|(name, _)| name != CONFIG && name != GENERATION_CONFIG));
        let (_, card) = found.last().unwrap();
        assert!(String::from_utf8_lossy(card).starts_with("---\nbase_model: \"a \\\"model\\\"\"\nlibrary_name: peft\n"));

        std::fs::create_dir(&out).unwrap();
        for name in ["tokenizer.json", CARD] {
            std::fs::write(out.join(name), "mine").unwrap();
        }
        let left: Vec<String> = files(&pack, &out, None).unwrap().into_iter().map(|(name, _)| name).collect();
        assert!(!left.iter().any(|name| name == "tokenizer.json" || name == CARD), "{left:?}");
    }
}
