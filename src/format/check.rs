//! The checks that opening skips: payload checksums, scales, and padding (spec section 8.2). Each
//! check covers one section or one gap, so callers may run them in any order and on any number of
//! threads.

use super::checksum::crc32;
use super::error::FormatError;
use super::index::Index;
use super::kinds::SectionKind;
use super::nf4::{self, Scales, ZERO_CODE};
use super::pack::Pack;
use super::section::Section;

/// `codes of model.layers.0.mlp.up_proj.weight`
pub fn describe(index: &Index, section: &Section) -> String {
    let kind = section.kind.map_or("unknown section", SectionKind::name);
    // Names come from the file: escape them, so they cannot control a terminal.
    format!("{kind} of {}", index.name(section).escape_debug())
}

/// Compares the checksum of a payload with the one in the section's record.
///
/// # Errors
/// [`FormatError::PayloadChecksum`] if `found` differs.
pub fn checksum(index: &Index, number: usize, section: &Section, found: u32) -> Result<(), FormatError> {
    if section.crc == found {
        return Ok(());
    }
    Err(FormatError::PayloadChecksum {
        section: number as u64,
        name: describe(index, section),
        offset: section.offset,
        length: section.length,
        expected: section.crc,
        found,
    })
}

/// Checks the values of a section's payload: scales are finite, and negative only if the header
/// allows it; the codes that pad the last block are 7. Raw tensors, files and unknown sections
/// always pass.
///
/// # Errors
/// [`FormatError::ScaleNotFinite`], [`FormatError::ScaleNegative`], [`FormatError::CodePadding`].
pub fn contents(index: &Index, number: usize, section: &Section, payload: &[u8]) -> Result<(), FormatError> {
    match section.kind {
        Some(SectionKind::Scales) => scales(index, number, section, payload),
        Some(SectionKind::Codes) => {
            let first = (section.shape.elements() / 2).min(payload.len() as u64);
            code_padding(index, number, section, first, payload.get(first as usize..).unwrap_or_default())
        }
        _ => Ok(()),
    }
}

fn scales(index: &Index, number: usize, section: &Section, payload: &[u8]) -> Result<(), FormatError> {
    let blocks = nf4::block_count(section.shape.elements(), section.block_size) as usize;
    let table = section.scale_type.and_then(|scale_type| Scales::from_payload(payload, scale_type, blocks));
    // A payload of the wrong length cannot come from a validated pack; with no table, nothing is
    // finite.
    scale_values(index, number, section, 0, &table.unwrap_or(Scales::F32(&[0xff; 4])))
}

/// Checks the values of the scales from number `first` on, a part of a section's table: finite, and
/// negative only if the header allows it.
///
/// # Errors
/// [`FormatError::ScaleNotFinite`], [`FormatError::ScaleNegative`].
pub(crate) fn scale_values(
    index: &Index,
    number: usize,
    section: &Section,
    first: u64,
    table: &Scales<'_>,
) -> Result<(), FormatError> {
    let signed = index.header().signed_scales();
    if all_allowed(table, signed) {
        return Ok(());
    }
    for i in 0..table.len() {
        let scale = table.get(i);
        if scale.is_finite() && (signed || !scale.is_sign_negative()) {
            continue;
        }
        let (section_number, name, offset, scale_number) =
            (number as u64, describe(index, section), section.offset, first + i as u64);
        return Err(if scale.is_finite() {
            FormatError::ScaleNegative { section: section_number, name, offset, scale: scale_number }
        } else {
            let found = scale.to_string();
            FormatError::ScaleNotFinite { section: section_number, name, offset, scale: scale_number, found }
        });
    }
    Ok(())
}

/// Whether every scale is finite and, unless `signed`, has no sign bit. It checks all of them at
/// once: one by one takes longer than copying the codes. Also false if this check cannot decide
/// (`dq8`).
fn all_allowed(table: &Scales<'_>, signed: bool) -> bool {
    let (largest, signs) = match table {
        Scales::F32(bytes) => {
            let (words, _) = bytes.as_chunks();
            extremes(words.iter().map(|&word| u32::from_le_bytes(word)))
        }
        Scales::Bf16(bytes) => {
            let (halves, _) = bytes.as_chunks();
            extremes(halves.iter().map(|&half| u32::from(u16::from_le_bytes(half)) << 16))
        }
        Scales::Dq8 { .. } => return false,
    };
    largest < f32::INFINITY.to_bits() && (signed || !signs)
}

/// The largest magnitude of float32 bit patterns (which order as their magnitudes do), and whether
/// any has the sign bit.
fn extremes(bits: impl Iterator<Item = u32>) -> (u32, bool) {
    let fold = |(largest, all): (u32, u32), x: u32| (largest.max(x & i32::MAX.cast_unsigned()), all | x);
    let (largest, all) = bits.fold((0, 0), fold);
    (largest, all >> 31 == 1)
}

/// Whether a scales payload has a scale with the sign bit set; false for every other kind of
/// section.
pub fn has_negative_scale(section: &Section, payload: &[u8]) -> bool {
    let blocks = nf4::block_count(section.shape.elements(), section.block_size) as usize;
    let table = section.scale_type.filter(|_| section.kind == Some(SectionKind::Scales));
    let table = table.and_then(|scale_type| Scales::from_payload(payload, scale_type, blocks));
    table.is_some_and(|t| (0..t.len()).any(|i| t.get(i).is_sign_negative()))
}

/// Checks that the codes after the last element are 7. `tail` is the end of the payload, from byte
/// `first` on, at most that of the last element.
///
/// # Errors
/// [`FormatError::CodePadding`].
pub(crate) fn code_padding(
    index: &Index,
    number: usize,
    section: &Section,
    first: u64,
    tail: &[u8],
) -> Result<(), FormatError> {
    let padded = 2 * (first + tail.len() as u64);
    for element in section.shape.elements()..padded {
        let byte = tail.get((element / 2 - first) as usize).copied().unwrap_or(0);
        let found = if element % 2 == 0 { byte & 15 } else { byte >> 4 };
        if found != ZERO_CODE {
            let (section_number, offset) = (number as u64, section.offset + element / 2);
            let name = describe(index, section);
            return Err(FormatError::CodePadding { section: section_number, name, element, offset, found });
        }
    }
    Ok(())
}

/// The gaps between the parts of a file, which must be zero: (start, end) of each that is not
/// empty.
pub fn gaps(index: &Index) -> impl Iterator<Item = (u64, u64)> + '_ {
    let header = index.header();
    let index_end = super::layout::HEADER_LEN as u64 + header.index_len;
    let front = [(index_end, header.metadata_offset)];
    let ends = std::iter::once(header.front_len()).chain(index.sections().iter().map(Section::end));
    let between = ends.zip(index.sections().iter().map(|s| s.offset));
    front.into_iter().chain(between).filter(|(start, end)| start < end)
}

/// Checks that the bytes of a gap (which starts at `start` in the file) are zero.
///
/// # Errors
/// [`FormatError::Padding`] with the first nonzero byte.
pub fn padding(start: u64, bytes: &[u8]) -> Result<(), FormatError> {
    match bytes.iter().position(|&b| b != 0) {
        None => Ok(()),
        Some(i) => Err(FormatError::Padding { offset: start + i as u64, found: bytes[i] }),
    }
}

/// Checks everything about a section of a pack in memory.
///
/// # Errors
/// As [`checksum`] and [`contents`].
pub fn section(pack: &Pack<'_>, number: usize, section: &Section) -> Result<(), FormatError> {
    let payload = pack.payload(section);
    checksum(pack.index(), number, section, crc32(payload))?;
    contents(pack.index(), number, section, payload)
}

/// Checks every section and gap of a pack in memory, on the calling thread. Returns all faults:
/// first of sections in file order, at most one of each, then of gaps.
///
/// `nf4pack::verify` (feature `convert`) does it in parallel, without mapping the payload.
pub fn all(pack: &Pack<'_>) -> Vec<FormatError> {
    let sections = pack.index().sections().iter().enumerate().map(|(number, s)| section(pack, number, s));
    let gaps = gaps(pack.index())
        .map(|(start, end)| padding(start, pack.bytes().get(start as usize..end as usize).unwrap_or_default()));
    sections.chain(gaps).filter_map(Result::err).collect()
}
