//! The files of a checkpoint that are no weights.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::error::SourceError;
use super::limits::{MAX_CONFIG_LEN, MAX_SIDE_FILE_LEN};
use super::snapshot::{Folder, OpenFile};
use crate::arch::config::not_json;
use crate::convert::notice::Notice;
use crate::format::Limits;
use crate::format::files::{CONFIG, GENERATION_CONFIG, LFS_POINTER, SNAPSHOT_FILES, TEMPLATES_FOLDER, packed_template};

/// The tokenizer that training and generation read.
const TOKENIZER: &str = "tokenizer.json";

/// Files that other programs make a tokenizer of; tokenizer.json can be made of them.
const OTHER_TOKENIZERS: [&str; 6] =
    ["tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v7", "tekken.json", "spiece.model", "vocab.json"];

/// Further templates that a checkpoint may have.
const MAX_TEMPLATES: usize = 256;

/// Names in a pack, and bytes.
pub(super) type SideFiles = Vec<(String, Vec<u8>)>;

/// Name in a pack and bytes of each side file that is present, config.json first, and what the user
/// should know.
pub(super) fn read(folder: &Folder, config: Option<&Path>) -> Result<(SideFiles, Vec<Notice>), SourceError> {
    let (mut files, mut empty) = (Vec::with_capacity(SNAPSHOT_FILES.len()), Vec::new());
    for name in SNAPSHOT_FILES {
        let (file, limit) = match config {
            _ if name != CONFIG => (folder.file(name)?, Limits::default().of_file(name)),
            Some(path) => (Some(OpenFile::open(path, path.to_owned())?), MAX_CONFIG_LEN),
            None => (folder.file(name)?, MAX_CONFIG_LEN),
        };
        match file {
            // A pack has no files without content.
            Some(file) if file.len == 0 && name != CONFIG => empty.push(name.to_owned()),
            Some(file) => files.push((name.to_owned(), read_one(&file, limit)?)),
            None if name == CONFIG => return Err(SourceError::NoConfig { folder: folder.shown.clone() }),
            None => {}
        }
    }
    let mut notices = Vec::new();
    read_templates(folder, &mut files, &mut empty, &mut notices)?;
    if !empty.is_empty() {
        notices.push(Notice::EmptyFiles { files: empty });
    }
    let generation = files.iter().find(|(name, _)| name == GENERATION_CONFIG);
    if let Some(error) = generation.and_then(|(_, bytes)| not_json(bytes)) {
        notices.push(Notice::GenerationConfigIgnored { why: error.to_string() });
    }
    Ok((files, notices))
}

/// What is to be said where the side files of a checkpoint have another tokenizer than the one that
/// this program reads.
pub(in crate::convert) fn no_tokenizer(files: &[(String, Vec<u8>)]) -> Option<Notice> {
    let has = |name: &str| files.iter().any(|(found, _)| found == name);
    let other = OTHER_TOKENIZERS.into_iter().find(|name| has(name));
    other.filter(|_| !has(TOKENIZER)).map(|other| Notice::NoTokenizer { other })
}

/// The chat templates in a folder of their own.
fn read_templates(
    folder: &Folder,
    files: &mut SideFiles,
    empty: &mut Vec<String>,
    notices: &mut Vec<Notice>,
) -> Result<(), SourceError> {
    let mut left_out = Vec::new();
    for name in folder.names_in(TEMPLATES_FOLDER, MAX_TEMPLATES)? {
        let path = format!("{TEMPLATES_FOLDER}/{name}");
        let Some(packed) = packed_template(&name) else {
            left_out.push(path);
            continue;
        };
        match folder.file(&path)? {
            Some(file) if file.len == 0 => empty.push(path),
            Some(file) => files.push((packed, read_one(&file, MAX_SIDE_FILE_LEN)?)),
            None => {}
        }
    }
    if !left_out.is_empty() {
        notices.push(Notice::FilesLeftOut { files: left_out });
    }
    Ok(())
}

/// The bytes of a file that is not a pointer of Git LFS.
pub(super) fn read_one(file: &OpenFile, limit: u64) -> Result<Vec<u8>, SourceError> {
    let bytes = file.read(limit)?;
    if bytes.starts_with(LFS_POINTER) {
        return Err(SourceError::LfsPointer { path: file.path.clone() });
    }
    Ok(bytes)
}

/// The ids of a tokenizer.json.
#[derive(Deserialize)]
struct Ids {
    model: Option<Model>,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Model {
    vocab: Option<LastId>,
}

/// The last id of a vocabulary: an object of tokens with their ids, or a list in the order of the
/// ids. The tokens are not kept: a stranger's file may have very many.
struct LastId(Option<u64>);

impl<'de> Deserialize<'de> for LastId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Vocabulary)
    }
}

struct Vocabulary;

impl<'de> Visitor<'de> for Vocabulary {
    type Value = LastId;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a vocabulary")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut tokens: A) -> Result<LastId, A::Error> {
        let mut last = None;
        while let Some((IgnoredAny, id)) = tokens.next_entry::<IgnoredAny, u64>()? {
            last = last.max(Some(id));
        }
        Ok(LastId(last))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut tokens: A) -> Result<LastId, A::Error> {
        let mut last = None;
        while let Some(IgnoredAny) = tokens.next_element()? {
            last = Some(last.map_or(0, |last| last + 1));
        }
        Ok(LastId(last))
    }
}

#[derive(Deserialize)]
struct Added {
    id: u64,
}

/// A notice if the tokenizer has ids for which the embedding, with `rows` rows, has none. A
/// tokenizer that cannot be read is another notice's concern.
pub(in crate::convert) fn tokens_without_rows(files: &[(String, Vec<u8>)], rows: u32) -> Option<Notice> {
    let (_, bytes) = files.iter().find(|(name, _)| name == TOKENIZER)?;
    let Ids { model, added_tokens } = serde_json::from_slice(bytes).ok()?;
    let last = model.and_then(|model| model.vocab).and_then(|LastId(last)| last);
    let last = last.into_iter().chain(added_tokens.into_iter().map(|added| added.id)).max()?;
    (last >= u64::from(rows)).then_some(Notice::TokensWithoutRows { last, rows })
}
