//! What only reading a payload can tell (spec section 8.2): CRC, scales, padding. The index is checked when a pack is opened.

use super::error::PayloadFault;
use super::nf4::{Scales, ZERO_CODE, block_count};
use super::section::{Kind, Section};

/// Compares a payload's CRC-32 with the record's.
pub fn check_crc(section: &Section, found: u32) -> Result<(), PayloadFault> {
    let expected = section.crc;
    if expected == found { Ok(()) } else { Err(PayloadFault::Crc { expected, found }) }
}

/// Checks what a whole payload says: scales are finite, and negative only where allowed; codes past the last weight are 7.
pub fn check_content(section: &Section, payload: &[u8], negative_scales: bool) -> Result<(), PayloadFault> {
    match section.kind {
        Kind::Codes => {
            let tail = usize::try_from(code_tail_offset(section)).unwrap_or(usize::MAX);
            check_code_tail(section, payload.get(tail..).unwrap_or_default())
        }
        Kind::Scales => check_scales(section, payload, negative_scales),
        Kind::Raw | Kind::File | Kind::Unknown(_) => Ok(()),
    }
}

/// Where in a codes payload the byte lies that holds the first padding code.
pub fn code_tail_offset(section: &Section) -> u64 {
    section.shape.elements() / 2
}

/// Checks the codes past the last weight; `tail` is the payload from [`code_tail_offset`] on.
pub fn check_code_tail(section: &Section, tail: &[u8]) -> Result<(), PayloadFault> {
    let elements = section.shape.elements();
    let first = elements - elements % 2;
    for (index, &byte) in (first..).step_by(2).zip(tail) {
        for (index, code) in [(index, byte & 15), (index + 1, byte >> 4)] {
            if index >= elements && code != ZERO_CODE {
                return Err(PayloadFault::CodePadding { index, found: code });
            }
        }
    }
    Ok(())
}

fn check_scales(section: &Section, payload: &[u8], negative_scales: bool) -> Result<(), PayloadFault> {
    let blocks = usize::try_from(block_count(section.shape.elements(), section.block_size)).unwrap_or(usize::MAX);
    let Some(scales) = section.scale_type.and_then(|scale_type| Scales::from_payload(payload, scale_type, blocks)) else {
        // A validated section has the length that its scales need; a shorter slice is the caller's, and holds no scale.
        return Err(PayloadFault::NonFiniteScale { index: 0, found: f32::NAN });
    };
    let mut buffer = [0.0_f32; 256];
    for first in (0..blocks).step_by(buffer.len()) {
        let count = buffer.len().min(blocks - first);
        let (chunk, _) = buffer.split_at_mut(count);
        scales.read(first, chunk);
        // One branch for the chunk in the common case; the culprit is looked for only where there is one.
        if chunk.iter().all(|&s| s.is_finite() & (negative_scales | (s >= 0.0))) {
            continue;
        }
        for (i, &found) in chunk.iter().enumerate() {
            let index = (first + i) as u64;
            if !found.is_finite() {
                return Err(PayloadFault::NonFiniteScale { index, found });
            }
            if !negative_scales && found < 0.0 {
                return Err(PayloadFault::NegativeScale { index, found });
            }
        }
    }
    Ok(())
}

/// Checks that `bytes`, which lie between two sections from `offset` on, are zero.
pub fn check_padding(offset: u64, bytes: &[u8]) -> Result<(), PayloadFault> {
    match bytes.iter().position(|&b| b != 0) {
        None => Ok(()),
        Some(i) => Err(PayloadFault::Padding { offset: offset + i as u64, found: bytes.get(i).copied().unwrap_or(0) }),
    }
}
