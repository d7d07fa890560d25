//! The global tensors of a pack: which of them are in GPU memory, and the output projection in
//! parts, which passes through GPU memory as layers do.

use std::ops::Range;

use crate::format::{Index, Role, Section, SectionKind};

use super::group::{Group, SLACK};

/// Parts of the output projection in GPU memory at a time: one in use, and the next.
pub(super) const PARTS: u32 = 2;
/// The bytes of a part are a multiple of this, so that each starts at an offset that can be copied.
const PART_ALIGN: u64 = 16;

/// The global tensors (embedding, final norm, output projection) of a layer stream.
///
/// Only raw tensors are left out or cut into parts: quantised ones take a quarter of the memory,
/// and stay in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Globals {
    /// None.
    #[default]
    None,
    /// All of them stay in GPU memory.
    All,
    /// All except the embedding table, if there is an output projection of its own.
    WithoutEmbedding,
    /// Neither embedding table nor output projection. The output projection, a stored `lm_head` or
    /// else the embedding, passes through GPU memory in parts of this number of rows.
    HeadInParts {
        /// Rows of a part.
        rows: u32,
    },
}

impl Globals {
    /// The sections of the tensors that stay in GPU memory. In the file they follow the embedded
    /// files.
    pub(super) fn resident(self, index: &Index, head: Option<&HeadParts>) -> Vec<usize> {
        let has_head = index.sections().iter().any(|section| is_global(section) && section.role == Role::LmHead);
        let without_embedding = match self {
            Self::None | Self::All => false,
            Self::WithoutEmbedding => has_head,
            Self::HeadInParts { .. } => has_head || head.is_some(),
        };
        let stays = |(number, section): &(usize, &Section)| {
            let is_head = head.is_some_and(|head| head.section == *number);
            let is_embedding = section.role == Role::Embedding && section.kind == Some(SectionKind::Raw);
            is_global(section) && !is_head && !(without_embedding && is_embedding)
        };
        index.sections().iter().enumerate().filter(stays).map(|(number, _)| number).collect()
    }
}

/// The section of a raw embedding table.
pub(super) fn embedding(index: &Index) -> Option<usize> {
    let is =
        |section: &Section| is_global(section) && section.role == Role::Embedding && section.kind == Some(SectionKind::Raw);
    index.sections().iter().position(is)
}

fn is_global(section: &Section) -> bool {
    section.layer.is_none() && section.kind.is_some_and(|kind| kind != SectionKind::File)
}

/// An output projection that passes through GPU memory in parts: some rows each, the last part
/// maybe fewer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadParts {
    pub(super) section: usize,
    /// Its bytes in the file.
    file: Range<u64>,
    columns: u64,
    part_rows: u64,
    row_bytes: u64,
}

impl HeadParts {
    /// `None` if the output projection is not requested in parts, or has no parts: it is quantised,
    /// or one part has all of it.
    pub(super) fn of(index: &Index, globals: Globals) -> Option<Self> {
        let Globals::HeadInParts { rows } = globals else { return None };
        let with = |role| {
            let is = |(_, section): &(usize, &Section)| is_global(section) && section.role == role;
            index.sections().iter().enumerate().find(is)
        };
        let (number, section) = with(Role::LmHead).or_else(|| with(Role::Embedding))?;
        let &[vocabulary, columns] = section.shape.dims() else { return None };
        let row_bytes = section.length.checked_div(vocabulary)?;
        let part_rows = u64::from(rows);
        let (file, is_raw) = (section.offset..section.end(), section.kind == Some(SectionKind::Raw));
        let parts = Self { section: number, file, columns, part_rows, row_bytes };
        let is_cut = part_rows > 0 && part_rows < vocabulary && parts.part_bytes().is_multiple_of(PART_ALIGN);
        (is_raw && is_cut).then_some(parts)
    }

    /// Number of parts.
    pub fn count(&self) -> u32 {
        (self.file.end - self.file.start).div_ceil(self.part_bytes()) as u32
    }

    /// Bytes of a part.
    pub(super) fn part_bytes(&self) -> u64 {
        self.part_rows.saturating_mul(self.row_bytes)
    }

    /// Bytes of a pass over all parts.
    pub fn pass_bytes(&self) -> u64 {
        self.file.end - self.file.start
    }

    /// GPU bytes of a part.
    pub(super) fn slot_bytes(&self) -> u64 {
        self.part_bytes().saturating_add(SLACK)
    }

    /// GPU bytes of all parts that are in GPU memory at a time.
    pub(super) fn bytes(&self) -> u64 {
        self.slot_bytes().saturating_mul(PARTS.into())
    }

    /// Part `number` as a group of its own.
    pub(super) fn group(&self, number: u32) -> Group {
        let start = self.file.start + u64::from(number) * self.part_bytes();
        let part = start.min(self.file.end)..(start + self.part_bytes()).min(self.file.end);
        Group { sections: vec![self.section], buffers: vec![part] }
    }

    /// Rows and columns of a part of `bytes` bytes.
    pub(super) fn shape(&self, bytes: u64) -> [u64; 2] {
        [bytes.checked_div(self.row_bytes).unwrap_or(0), self.columns]
    }
}
