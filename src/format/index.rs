//! The validated index of a pack: every rule that can be checked without reading a payload (spec
//! sections 3 to 5).

use std::cmp::Ordering;
use std::collections::HashMap;
use std::ops::Range;

use super::checksum::crc32;
use super::error::{Field, FormatError, Part};
use super::header::{Header, u64_at};
use super::kinds::{Role, SectionKind};
use super::layout::{GROUP_ALIGN, HEADER_LEN, Limits, NAME_END_LEN, RECORD_LEN, SECTION_ALIGN, align_up, record};
use super::section::{self, Section};

/// Header, sections, names and metadata of a pack, after validation. It owns them and has no
/// payload.
///
/// Opening is O(header + index + metadata): no payload is read. [`super::check`]
/// checks payload checksums, scales and padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    header: Header,
    sections: Vec<Section>,
    names: Names,
    /// Range of sections of each layer.
    layers: Vec<Range<usize>>,
    metadata: String,
}

impl Index {
    /// Validates `front`, the first bytes of a file of `file_len` bytes: at least
    /// [`Header::front_len`] of them (the whole file works, too), under the [default
    /// limits](Limits::default).
    ///
    /// # Errors
    /// The first rule of the specification that the front breaks.
    pub fn parse(front: &[u8], file_len: u64) -> Result<Self, FormatError> {
        Self::parse_with(front, file_len, &Limits::default())
    }

    /// [`Index::parse`] with the caller's limits.
    ///
    /// # Errors
    /// As [`Index::parse`].
    pub fn parse_with(front: &[u8], file_len: u64, limits: &Limits) -> Result<Self, FormatError> {
        let header = Header::decode(front, file_len, limits)?;
        let index = part(front, Part::Index, HEADER_LEN as u64, header.index_len, header.index_crc)?;
        let metadata = part(front, Part::Metadata, header.metadata_offset, header.metadata_len, header.metadata_crc)?;
        let metadata = std::str::from_utf8(metadata)
            .map_err(|e| FormatError::MetadataNotUtf8 { offset: header.metadata_offset + e.valid_up_to() as u64 })?;
        let (records, rest) = index.split_at(RECORD_LEN * header.section_count as usize);
        let names = parse_names(rest, &header, limits)?;
        let sections = parse_sections(records, &names, &header, limits)?;
        let layers = check_layers(&sections, header.layer_count)?;
        Ok(Self { header, sections, names, layers, metadata: metadata.to_owned() })
    }

    /// The file's header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Every section, in file order.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The name of a section of this index.
    pub fn name(&self, section: &Section) -> &str {
        self.names.get(section.name).unwrap_or_default()
    }

    /// The tensors, in file order: number and record of the first section of each, which has its
    /// codes or its elements.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, &Section)> {
        let is_first = |s: &Section| matches!(s.kind, Some(SectionKind::Codes | SectionKind::Raw));
        self.sections.iter().enumerate().filter(move |(_, section)| is_first(section))
    }

    /// Whether a tensor outside the layers has this role, quantised or not.
    pub fn has(&self, role: Role) -> bool {
        self.tensors().any(|(_, section)| section.role == role && section.layer.is_none())
    }

    /// The range of sections of each layer.
    pub fn layers(&self) -> &[Range<usize>] {
        &self.layers
    }

    /// The place of a layer in the file: from a multiple of 4096 to the end of its last section.
    /// `None` past the last layer.
    pub fn layer_range(&self, number: u32) -> Option<Range<u64>> {
        let sections = self.sections.get(self.layers.get(number as usize)?.clone())?;
        Some(sections.first()?.offset..sections.last()?.end())
    }

    /// The provenance record: JSON text (see [`super::Provenance`]).
    pub fn metadata(&self) -> &str {
        &self.metadata
    }
}

/// The name table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Names {
    /// All names, one after the other.
    text: String,
    /// Where each name ends in `text`.
    ends: Vec<usize>,
}

impl Names {
    /// Name `number`; `None` past the last one.
    fn get(&self, number: u64) -> Option<&str> {
        let i = usize::try_from(number).ok()?;
        let start = i.checked_sub(1).and_then(|i| self.ends.get(i)).copied().unwrap_or(0);
        self.ends.get(i).and_then(|&end| self.text.get(start..end))
    }
}

/// The bytes of the index or of the metadata, after their checksum.
fn part(front: &[u8], part: Part, offset: u64, len: u64, expected: u32) -> Result<&[u8], FormatError> {
    let end = offset.saturating_add(len);
    let range = usize::try_from(offset).ok().zip(usize::try_from(end).ok());
    let Some(bytes) = range.and_then(|(start, end)| front.get(start..end)) else {
        return Err(FormatError::TooShort { part, expected: end, found: front.len() as u64 });
    };
    let found = crc32(bytes);
    if expected != found {
        return Err(FormatError::Checksum { part, offset, expected, found });
    }
    Ok(bytes)
}

/// Names and where each ends: UTF-8, unique, none empty, the last one ending with the index.
fn parse_names(bytes: &[u8], header: &Header, limits: &Limits) -> Result<Names, FormatError> {
    let (ends, text) = bytes.split_at(NAME_END_LEN * header.name_count as usize);
    let text_offset = HEADER_LEN as u64 + header.index_len - text.len() as u64;
    let end_offset = |name: u64| text_offset - (header.name_count - name) * NAME_END_LEN as u64;
    let mut all_ends = Vec::with_capacity(header.name_count as usize);
    let mut first_seen = HashMap::with_capacity(header.name_count as usize);
    let mut start = 0;
    for name in 0..header.name_count {
        let end = u64_at(ends, NAME_END_LEN * name as usize);
        let (min, max) = (start as u64 + 1, text.len() as u64);
        let Some(bytes) = text.get(start..end as usize).filter(|_| (min..=max).contains(&end)) else {
            return Err(FormatError::NameRange { name, offset: end_offset(name), min, max, found: end });
        };
        if bytes.len() as u64 > limits.name_len {
            let (offset, limit, found) = (end_offset(name), limits.name_len, bytes.len() as u64);
            return Err(FormatError::Limit { field: Field::NameLength, offset, limit, found });
        }
        let text = std::str::from_utf8(bytes)
            .map_err(|e| FormatError::NameNotUtf8 { name, offset: text_offset + (start + e.valid_up_to()) as u64 })?;
        if let Some(first) = first_seen.insert(text, name) {
            let offset = text_offset + start as u64;
            return Err(FormatError::NameDuplicate { name, offset, first, text: text.to_owned() });
        }
        start = end as usize;
        all_ends.push(start);
    }
    if start != text.len() {
        let (name, len) = (header.name_count.saturating_sub(1), text.len() as u64);
        let offset = end_offset(name);
        return Err(FormatError::NameRange { name, offset, min: len, max: len, found: start as u64 });
    }
    // Every name is UTF-8 by itself, so all of them together are.
    Ok(Names { text: String::from_utf8_lossy(text).into_owned(), ends: all_ends })
}

/// Decodes all records and checks each against the ones before it: names, order, pairs, places.
fn parse_sections(records: &[u8], names: &Names, header: &Header, limits: &Limits) -> Result<Vec<Section>, FormatError> {
    let mut sections: Vec<Section> = Vec::with_capacity(header.section_count as usize);
    let mut walk = Walk { names, limits, names_used: 0, end: header.front_len(), first: header.first_section_offset() };
    let (records, _) = records.as_chunks::<RECORD_LEN>();
    for (number, bytes) in records.iter().enumerate() {
        let section = section::decode(bytes, number as u64, limits)?;
        if section.role.required_feature() & !header.required_features != 0 {
            return Err(section::unknown_role(number as u64, section.role));
        }
        walk.step(&section, sections.last(), number as u64)?;
        sections.push(section);
    }
    let number = sections.len() as u64;
    if sections.last().is_some_and(|s| s.kind == Some(SectionKind::Codes)) {
        return Err(FormatError::Unpaired { section: number - 1, offset: section::record_offset(number - 1) });
    }
    if walk.names_used != header.name_count {
        let offset = super::layout::header::NAME_COUNT as u64;
        let (expected, found) = (walk.names_used, header.name_count);
        return Err(FormatError::Header { field: Field::NameCount, offset, expected, found });
    }
    if walk.end != header.file_len {
        return Err(FormatError::FileLength { expected: walk.end, found: header.file_len });
    }
    Ok(sections)
}

/// The state after the previous record.
struct Walk<'a> {
    names: &'a Names,
    limits: &'a Limits,
    /// Names that records have used so far; a record uses one of them or the next.
    names_used: u64,
    /// Where the last section (or the metadata) ended.
    end: u64,
    /// Where the first section must start.
    first: u64,
}

impl Walk<'_> {
    fn step(&mut self, section: &Section, previous: Option<&Section>, number: u64) -> Result<(), FormatError> {
        let after_codes = previous.filter(|p| p.kind == Some(SectionKind::Codes));
        let paired = match (section.kind, after_codes) {
            (Some(SectionKind::Scales), Some(codes)) => section.same_tensor(codes),
            (Some(SectionKind::Scales), None) | (_, Some(_)) => false,
            (_, None) => true,
        };
        if !paired {
            return Err(FormatError::Unpaired { section: number, offset: section::record_offset(number) });
        }
        if after_codes.is_none() {
            self.check_order_and_name(section, previous, number)?;
        }
        let expected = self.next_offset(section, previous);
        if section.offset != expected {
            return Err(section::mismatch(number, Field::Offset, record::OFFSET, expected, section.offset));
        }
        self.end = section.end();
        Ok(())
    }

    /// A tensor or file follows the previous one in order, and uses the next name. (A scale table
    /// has the place and the name of its codes.)
    fn check_order_and_name(
        &mut self,
        section: &Section,
        previous: Option<&Section>,
        number: u64,
    ) -> Result<(), FormatError> {
        let out_of_order = FormatError::Order { section: number, offset: section::record_offset(number) };
        let order = previous.map_or(Ordering::Less, |p| p.sort_key().cmp(&section.sort_key()));
        let may_be_equal = section.role == Role::Other;
        if order == Ordering::Greater || (order == Ordering::Equal && !may_be_equal) {
            return Err(out_of_order);
        }
        let expected = self.names_used;
        let offset = section::record_offset(number) + record::NAME as u64;
        if section.name != expected {
            return Err(section::mismatch(number, Field::Name, record::NAME, expected, section.name));
        }
        let Some(name) = self.names.get(section.name) else {
            return Err(FormatError::Unknown { section: number, field: Field::Name, offset, found: section.name });
        };
        self.names_used += 1;
        if order == Ordering::Equal && previous.and_then(|p| self.names.get(p.name)) >= Some(name) {
            return Err(out_of_order);
        }
        if section.kind == Some(SectionKind::File) {
            self.check_file(section, name, number)?;
        }
        Ok(())
    }

    /// A file has a plain name, and a length that may be read at once.
    fn check_file(&self, section: &Section, name: &str, number: u64) -> Result<(), FormatError> {
        let at = |field: usize| section::record_offset(number) + field as u64;
        if !is_plain_file_name(name) {
            return Err(FormatError::FileName { section: number, offset: at(record::NAME), text: name.to_owned() });
        }
        let limit = self.limits.of_file(name);
        if section.length > limit {
            let (offset, found) = (at(record::LENGTH), section.length);
            return Err(FormatError::Limit { field: Field::FileLength, offset, limit, found });
        }
        Ok(())
    }

    /// The only valid start of a section: the aligned end of the previous one.
    fn next_offset(&self, section: &Section, previous: Option<&Section>) -> u64 {
        let group = |s: &Section| section::group(s.kind, s.layer);
        let aligned = match previous {
            None => Some(self.first),
            Some(p) if group(p) == group(section) => align_up(self.end, SECTION_ALIGN),
            Some(_) => align_up(self.end, GROUP_ALIGN),
        };
        aligned.unwrap_or(u64::MAX)
    }
}

/// Whether a name is a plain file name on every system: a pack must not choose the folder of an
/// export.
fn is_plain_file_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    name.bytes().all(plain) && !name.starts_with('.')
}

/// The range of sections of each layer; every layer below `layer_count` must have one.
fn check_layers(sections: &[Section], layer_count: u32) -> Result<Vec<Range<usize>>, FormatError> {
    let mut layers: Vec<Range<usize>> = Vec::new();
    for (number, section) in sections.iter().enumerate() {
        let Some(layer) = section.layer else { continue };
        let layer = layer as usize;
        if layer == layers.len() {
            layers.push(number..number + 1);
        } else if layer + 1 == layers.len() {
            layers[layer].end = number + 1;
        } else {
            let offset = section::record_offset(number as u64);
            return Err(FormatError::LayerMissing { layer: layers.len() as u64, offset });
        }
    }
    if layers.len() > layer_count as usize {
        let offset = super::layout::header::LAYER_COUNT as u64;
        let (expected, found) = (layers.len() as u64, layer_count.into());
        return Err(FormatError::Header { field: Field::LayerCount, offset, expected, found });
    }
    if layers.len() < layer_count as usize {
        let offset = section::record_offset(sections.len() as u64);
        return Err(FormatError::LayerMissing { layer: layers.len() as u64, offset });
    }
    Ok(layers)
}
