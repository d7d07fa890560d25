//! From bytes to a pack: one validation (spec section 8.1), then accessors that cannot fail.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use super::error::{Error, PayloadFault, SectionFault};
use super::header::Header;
use super::layout::{HEADER_LEN, LAYER_ALIGN, Limits, RECORD_LEN, SECTION_ALIGN, align_up, record};
use super::metadata::Metadata;
use super::nf4::{Projection, Scales, block_count};
use super::payload::{check_content, check_crc, check_padding};
use super::role::Role;
use super::section::{Fields, Kind, Section, decode};

/// The validated table of a pack: what it holds and where, without the payloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// The file's header.
    pub header: Header,
    /// Where the pack came from.
    pub metadata: Metadata,
    sections: Vec<Section>,
    /// Sections of the model itself, then of layer 0, 1, ...
    groups: Vec<Range<usize>>,
}

impl Index {
    /// Reads and validates header, index and metadata. `head` holds at least the file's bytes up to the end of the metadata
    /// ([`Index::head_len`]); `file_len` is the length of the whole file.
    ///
    /// Takes time and memory in proportion to the index, never to what the file claims.
    ///
    /// # Errors
    /// The first thing that breaks a rule of the specification.
    pub fn parse(head: &[u8], file_len: u64) -> Result<Self, Error> {
        let limits = Limits::V1;
        let header = Header::decode(head, file_len, &limits)?;
        let end = header.metadata_offset + header.metadata_len;
        let too_short = Error::TooShort { expected: end, found: head.len() as u64 };
        let range = |start: u64, end: u64| -> Option<&[u8]> { head.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?) };
        let index = range(HEADER_LEN, header.metadata_offset).ok_or_else(|| too_short.clone())?;
        let metadata = range(header.metadata_offset, end).ok_or(too_short)?;
        let (expected, found) = (header.index_crc, crc32fast::hash(index));
        if expected != found {
            return Err(Error::IndexCrc { expected, found });
        }
        let (expected, found) = (header.metadata_crc, crc32fast::hash(metadata));
        if expected != found {
            return Err(Error::MetadataCrc { expected, found });
        }
        let metadata = serde_json::from_slice(metadata)
            .map_err(|e| Error::Metadata { offset: header.metadata_offset, reason: e.to_string() })?;
        let sections = decode_sections(index, &header, &limits)?;
        let groups = group_by_layer(&sections, &header)?;
        check_order(&sections)?;
        check_placement(&sections, &header)?;
        Ok(Self { header, metadata, sections, groups })
    }

    /// Bytes from the start of the file that [`Index::parse`] needs, as the header in `head` (at least 128 bytes) says.
    ///
    /// # Errors
    /// As for [`Index::parse`], for the header alone.
    pub fn head_len(head: &[u8], file_len: u64) -> Result<u64, Error> {
        Header::decode(head, file_len, &Limits::V1).map(|header| header.metadata_offset + header.metadata_len)
    }

    /// Every section, in the order of the file.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Number of layers.
    pub fn layer_count(&self) -> u32 {
        (self.groups.len() - 1) as u32
    }

    /// Places in [`Index::sections`] of layer `layer`, or of the model's own sections for `None`; empty past the last layer.
    pub fn layer_sections(&self, layer: Option<u32>) -> Range<usize> {
        self.groups.get(layer.map_or(0, |l| l as usize + 1)).cloned().unwrap_or(0..0)
    }

    /// First and past-the-end byte in the file of all sections of `layer`: one sequential read. `None` past the last layer.
    pub fn layer_bytes(&self, layer: u32) -> Option<Range<u64>> {
        let sections = self.sections.get(self.layer_sections(Some(layer)))?;
        let (first, last) = (sections.first()?, sections.last()?);
        Some(first.offset..last.offset + last.len)
    }

    /// The zero bytes ahead of section `i`, as a range of the file; empty where there are none.
    pub fn padding_before(&self, i: usize) -> Range<u64> {
        let end = match i.checked_sub(1).and_then(|before| self.sections.get(before)) {
            Some(before) => before.offset + before.len,
            None => self.header.metadata_offset + self.header.metadata_len,
        };
        end..self.sections.get(i).map_or(end, |s| s.offset)
    }
}

/// Decodes the records and their names. The names lie behind the records in the records' order, without gaps.
fn decode_sections(index: &[u8], header: &Header, limits: &Limits) -> Result<Vec<Section>, Error> {
    let names_start = (header.section_count * RECORD_LEN) as usize;
    let (records, names) = index.split_at_checked(names_start).unwrap_or((index, &[]));
    let mut sections: Vec<Section> = Vec::with_capacity(records.len() / record::LEN);
    let (mut name_start, mut name_end) = (0_u64, 0_u64);
    for (i, bytes) in (0_u64..).zip(records.chunks_exact(record::LEN)) {
        let fields = Fields(bytes);
        // A scales section shares the name of its codes; whether it follows them is checked with the order.
        if fields.u16(record::KIND) != Kind::Scales.number() {
            name_start = name_end;
            name_end = name_start.saturating_add(fields.u64(record::NAME_LEN));
        }
        let name = read_name(i, &fields, names, name_start, name_end, limits)?;
        sections.push(decode(i, name, &fields)?);
    }
    if name_end == names.len() as u64 {
        return Ok(sections);
    }
    let last = sections.last().map_or("", |s| &s.name);
    let fault = SectionFault::NameOffset { expected: names.len() as u64, found: name_end };
    Err(Error::section(header.section_count.saturating_sub(1), last, fault))
}

fn read_name<'a>(
    index: u64,
    fields: &Fields<'_>,
    names: &'a [u8],
    start: u64,
    end: u64,
    limits: &Limits,
) -> Result<&'a str, Error> {
    let fault = |fault| Error::section(index, "", fault);
    let (offset, len) = (fields.u64(record::NAME_OFFSET), fields.u64(record::NAME_LEN));
    if len == 0 || len > limits.name_len {
        return Err(fault(SectionFault::NameLength { limit: limits.name_len, found: len }));
    }
    if offset != start || len != end - start {
        return Err(fault(SectionFault::NameOffset { expected: start, found: offset }));
    }
    usize::try_from(start)
        .ok()
        .zip(usize::try_from(end).ok())
        .and_then(|(start, end)| names.get(start..end))
        .and_then(|bytes| std::str::from_utf8(bytes).ok())
        .ok_or_else(|| fault(SectionFault::NameBytes { offset }))
}

/// Splits the sections into the model's own and one run per layer, 0 to `layer_count` without a gap.
fn group_by_layer(sections: &[Section], header: &Header) -> Result<Vec<Range<usize>>, Error> {
    let mut groups = Vec::with_capacity(header.layer_count.min(sections.len() as u64) as usize + 1);
    let mut start = 0;
    for (i, pair) in sections.windows(2).enumerate() {
        if let [a, b] = pair
            && a.layer != b.layer
        {
            groups.push(start..i + 1);
            start = i + 1;
        }
    }
    groups.push(start..sections.len());
    if sections.first().is_none_or(|s| s.layer.is_some()) {
        groups.insert(0, 0..0);
        groups.retain(|g| !g.is_empty() || g.start == 0);
    }
    if sections.is_empty() {
        groups.truncate(1);
    }
    let count = header.layer_count;
    for (i, group) in groups.iter().enumerate().skip(1) {
        let section = sections.get(group.start);
        let found = section.and_then(|s| s.layer).map_or(u64::MAX, u64::from);
        let expected = i as u64 - 1;
        if found != expected || expected >= count {
            let name = section.map_or("", |s| &s.name);
            return Err(Error::section(group.start as u64, name, SectionFault::Layer { expected, found, count }));
        }
    }
    let found = groups.len() as u64 - 1;
    if found != count {
        let name = sections.last().map_or("", |s| &s.name);
        let fault = SectionFault::Layer { expected: count, found, count };
        return Err(Error::section(sections.len().saturating_sub(1) as u64, name, fault));
    }
    Ok(groups)
}

/// Order, uniqueness, and codes with their scales right behind them.
fn check_order(sections: &[Section]) -> Result<(), Error> {
    let mut names = HashSet::with_capacity(sections.len());
    let mut before: Option<&Section> = None;
    for (i, section) in sections.iter().enumerate() {
        let fault = |fault| Err(Error::section(i as u64, &section.name, fault));
        if section.kind == Kind::Scales {
            if !before.is_some_and(|codes| goes_with(codes, section)) {
                return fault(SectionFault::ScalesMismatch);
            }
            before = Some(section);
            continue;
        }
        if let Some(before) = before {
            if before.kind == Kind::Codes {
                let name = &before.name;
                return Err(Error::section(i as u64 - 1, name, SectionFault::ScalesMissing));
            }
            if before.name != section.name && section.order_key() < before.order_key() {
                return fault(SectionFault::Order { index: i as u64 });
            }
            let (role, a, b) = (section.role, before.order_key(), section.order_key());
            let is_tensor = matches!(section.kind, Kind::Codes | Kind::Raw);
            if is_tensor && role != Role::Other && (a.0, a.1, a.2, a.3) == (b.0, b.1, b.2, b.3) {
                return fault(SectionFault::DuplicateRole);
            }
        }
        if !names.insert(&*section.name) {
            return fault(SectionFault::DuplicateName);
        }
        before = Some(section);
    }
    match sections.last() {
        Some(last) if last.kind == Kind::Codes => {
            Err(Error::section(sections.len() as u64 - 1, &last.name, SectionFault::ScalesMissing))
        }
        _ => Ok(()),
    }
}

fn goes_with(codes: &Section, scales: &Section) -> bool {
    codes.kind == Kind::Codes
        && codes.order_key() == scales.order_key()
        && (codes.shape, codes.block_size, codes.scale_type) == (scales.shape, scales.block_size, scales.scale_type)
}

/// Where the next section starts, after bytes that end at `end`; `None` on overflow.
pub(crate) fn next_offset(end: u64, layer_before: Option<u32>, layer: Option<u32>) -> Option<u64> {
    align_up(end, if layer == layer_before { SECTION_ALIGN } else { LAYER_ALIGN })
}

/// Every offset follows from the one before; the last section ends where the file ends.
fn check_placement(sections: &[Section], header: &Header) -> Result<(), Error> {
    let mut end = header.metadata_offset + header.metadata_len;
    let mut layer = None;
    for (i, section) in sections.iter().enumerate() {
        let fault = |fault| Err(Error::section(i as u64, &section.name, fault));
        let (found, len, file_len) = (section.offset, section.len, header.file_len);
        let past_end = SectionFault::PastEnd { offset: found, len, file_len };
        let Some(expected) = next_offset(end, layer, section.layer) else {
            return fault(past_end);
        };
        if found < end {
            return fault(SectionFault::Overlap { expected, found });
        }
        if found < expected || found % SECTION_ALIGN != 0 {
            return fault(SectionFault::Misaligned { expected, found });
        }
        if found > expected {
            return fault(SectionFault::Hole { expected, found });
        }
        end = match found.checked_add(len) {
            Some(end) if end <= file_len => end,
            _ => return fault(past_end),
        };
        layer = section.layer;
    }
    if end == header.file_len { Ok(()) } else { Err(Error::FileLength { expected: end, found: header.file_len }) }
}

/// A validated pack over bytes that somebody else holds (a file in memory, a mapped file).
#[derive(Debug, Clone)]
pub struct Pack<'a> {
    bytes: &'a [u8],
    index: Arc<Index>,
}

impl<'a> Pack<'a> {
    /// Validates `bytes`, a whole pack. Payloads are not read; see [`Pack::verify_section`].
    ///
    /// # Errors
    /// The first thing that breaks a rule of the specification.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        let index = Index::parse(bytes, bytes.len() as u64)?;
        Ok(Self { bytes, index: Arc::new(index) })
    }

    /// Joins `bytes` with an index that was parsed from them before.
    #[cfg(feature = "mmap")]
    pub(crate) fn from_parts(bytes: &'a [u8], index: Arc<Index>) -> Self {
        Self { bytes, index }
    }

    /// The validated table.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Number of layers.
    pub fn layer_count(&self) -> u32 {
        self.index.layer_count()
    }

    /// The tensors of layer `layer`, in the order of the file; none past the last layer.
    pub fn layer(&self, layer: u32) -> impl Iterator<Item = Tensor<'a>> + '_ {
        self.tensors_in(self.index.layer_sections(Some(layer)))
    }

    /// Every tensor, the model's own first, then layer by layer.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'a>> + '_ {
        self.tensors_in(0..self.index.sections.len())
    }

    /// The tensor of that layer (`None`: the model's own), role and expert.
    pub fn find(&self, layer: Option<u32>, role: Role, expert: Option<u32>) -> Option<Tensor<'a>> {
        self.tensors_in(self.index.layer_sections(layer)).find(|t| t.section.role == role && t.section.expert == expert)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'a>> {
        self.tensors().find(|t| &*t.section.name == name)
    }

    /// The checkpoint's files that the pack carries, such as `config.json`: name and bytes.
    pub fn files(&self) -> impl Iterator<Item = (&str, &'a [u8])> {
        let files = self.index.sections.iter().filter(|s| s.kind == Kind::File);
        files.map(|s| (&*s.name, self.payload(s)))
    }

    /// The bytes of the checkpoint's file called `name`.
    pub fn file(&self, name: &str) -> Option<&'a [u8]> {
        self.files().find(|(n, _)| *n == name).map(|(_, bytes)| bytes)
    }

    /// Payload of one of this pack's sections.
    pub fn payload(&self, section: &Section) -> &'a [u8] {
        let range = usize::try_from(section.offset).ok().zip(usize::try_from(section.offset + section.len).ok());
        range.and_then(|(start, end)| self.bytes.get(start..end)).unwrap_or_default()
    }

    /// Reads section `i` and the padding before it: CRC, scales, padding. Reading a pack's payloads takes time in proportion
    /// to their size, so it is left to the caller when: all at once, or each layer on its first use.
    ///
    /// # Errors
    /// What is damaged.
    pub fn verify_section(&self, i: usize) -> Result<(), PayloadFault> {
        let Some(section) = self.index.sections.get(i) else { return Ok(()) };
        let padding = self.index.padding_before(i);
        let bytes = self.bytes.get(padding.start as usize..padding.end as usize).unwrap_or_default();
        check_padding(padding.start, bytes)?;
        let payload = self.payload(section);
        check_crc(section, crc32fast::hash(payload))?;
        check_content(section, payload, self.index.header.negative_scales())
    }

    fn tensors_in(&self, range: Range<usize>) -> impl Iterator<Item = Tensor<'a>> + '_ {
        range.filter_map(|i| self.tensor_at(i))
    }

    /// The tensor that section `i` starts, if it starts one.
    fn tensor_at(&self, i: usize) -> Option<Tensor<'a>> {
        let section = self.index.sections.get(i)?;
        let data = match section.kind {
            Kind::Raw => TensorData::Raw(self.payload(section)),
            Kind::Codes => TensorData::Nf4(self.projection(section, self.index.sections.get(i + 1)?)?),
            Kind::Scales | Kind::File | Kind::Unknown(_) => return None,
        };
        Some(Tensor { index: self.index.clone(), section: section.clone(), data })
    }

    fn projection(&self, codes: &Section, scales: &Section) -> Option<Projection<'a>> {
        let elements = codes.shape.elements();
        let blocks = usize::try_from(block_count(elements, codes.block_size)).ok()?;
        let scales = Scales::from_payload(self.payload(scales), codes.scale_type?, blocks)?;
        Some(Projection { codes: self.payload(codes), scales, block_size: codes.block_size, elements })
    }
}
