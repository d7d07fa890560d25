//! The part of a conversion that is finished, so that an interrupted one can be continued.
//!
//! The file of the finished part is the pack at its final offsets, then two slots, then a trailer.
//! A [`Record`] says what is finished; each goes into the slot of the older one, after the bytes
//! that it names are durable. So one record is whole after any crash. A later run does not trust
//! it: it compares the CRC-32 of every finished payload, and the SHA-256 of the source bytes that
//! they were made from.

use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};

use super::report::RoleSums;
use crate::format::crc32;
use crate::io::read_exact_at;
use crate::io::step::Output;

/// Raised when an encoder gives other bytes for the same checkpoint and options.
pub(super) const ENCODER_REVISION: u32 = 1;

/// The first bytes of the trailer.
const MAGIC: [u8; 8] = *b"nf4part1";
/// Magic, start of the slots, length of one, and their CRC-32.
const TRAILER_LEN: u64 = 28;
/// Length and CRC-32 of a record.
const RECORD_HEAD: usize = 8;
/// Bytes of a slot for all but sections and files.
const SLOT_BASE: u64 = 64 << 10;
/// Bytes of a slot for a section: `[4294967295,18446744073709551615],`.
const SLOT_SECTION: u64 = 40;
/// Bytes of a slot for the hash of a file.
const SLOT_FILE: u64 = 70;
/// The longest slot that is read.
const MAX_SLOT: u64 = 1 << 30;

/// What is finished.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// Larger for each later record.
    pub(super) sequence: u64,
    /// SHA-256 of all that determines the bytes, except the weights.
    pub(super) identity: String,
    /// SHA-256 of each finished source file.
    pub(super) hashes: Vec<String>,
    /// Finished bytes of the next source file.
    pub(super) offset: u64,
    /// Their SHA-256.
    pub(super) hash: String,
    /// CRC-32 and length of the finished part of each section; zeros for embedded files.
    pub(super) sections: Vec<(u32, u64)>,
    /// Whether a scale is negative.
    pub(super) signed: bool,
    /// The sums of each role, by its number.
    pub(super) roles: Vec<(u16, RoleSums)>,
    /// Finished weights.
    pub(super) done: u64,
}

/// The place of the slots after a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slots {
    start: u64,
    len: u64,
}

impl Slots {
    /// For a pack of `pack_len` bytes.
    pub(super) fn new(pack_len: u64, sections: usize, files: usize) -> Self {
        let len = SLOT_BASE + SLOT_SECTION * sections as u64 + SLOT_FILE * files as u64;
        Self { start: pack_len, len: len.next_multiple_of(4096) }
    }

    fn trailer(&self) -> [u8; TRAILER_LEN as usize] {
        let mut bytes = [0; TRAILER_LEN as usize];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.start.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.len.to_le_bytes());
        let crc = crc32(&bytes[..24]);
        bytes[24..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Makes an empty file of it.
    pub(super) fn clear(&self, output: &Output) -> io::Result<()> {
        output.set_len(0)?;
        output.set_len(self.start + 2 * self.len)?;
        output.write_at(&self.trailer(), self.start + 2 * self.len)
    }

    /// Writes a record, after all that was written before is durable.
    pub(super) fn write(&self, output: &Output, record: &Record) -> io::Result<()> {
        let json = serde_json::to_vec(record)?;
        let mut bytes = Vec::with_capacity(RECORD_HEAD + json.len());
        bytes.extend((json.len() as u32).to_le_bytes());
        bytes.extend(crc32(&json).to_le_bytes());
        bytes.extend(json);
        if bytes.len() as u64 > self.len {
            return Err(io::Error::other("the record of the finished part is too long"));
        }
        output.sync_data()?;
        output.write_at(&bytes, self.start + record.sequence % 2 * self.len)?;
        output.sync_data()
    }
}

/// The whole records of a file, the newest first.
///
/// # Errors
/// Any error of the operating system. A file without records is none.
pub(super) fn read(file: &File) -> io::Result<Vec<Record>> {
    let Some(slots) = read_trailer(file)? else { return Ok(Vec::new()) };
    let mut records = Vec::new();
    for number in 0..2 {
        records.extend(read_record(file, slots.start + number * slots.len, slots.len)?);
    }
    records.sort_by_key(|record| std::cmp::Reverse(record.sequence));
    Ok(records)
}

fn read_trailer(file: &File) -> io::Result<Option<Slots>> {
    let len = file.metadata()?.len();
    let Some(at) = len.checked_sub(TRAILER_LEN) else { return Ok(None) };
    let mut bytes = [0; TRAILER_LEN as usize];
    read_exact_at(file, &mut bytes, at)?;
    let word = |at: usize| bytes.get(at..).and_then(|b| b.first_chunk().copied()).map_or(0, u64::from_le_bytes);
    let slots = Slots { start: word(8), len: word(16) };
    let end = slots.len.checked_mul(2).and_then(|len| len.checked_add(slots.start));
    let is_whole = bytes == slots.trailer() && end == Some(at) && slots.len <= MAX_SLOT;
    Ok(is_whole.then_some(slots))
}

fn read_record(file: &File, at: u64, slot_len: u64) -> io::Result<Option<Record>> {
    let mut head = [0; RECORD_HEAD];
    read_exact_at(file, &mut head, at)?;
    let [len, crc] = [0, 4].map(|at| head.get(at..).and_then(|b| b.first_chunk().copied()).map_or(0, u32::from_le_bytes));
    if u64::from(len) + RECORD_HEAD as u64 > slot_len {
        return Ok(None);
    }
    let mut json = vec![0; len as usize];
    read_exact_at(file, &mut json, at + RECORD_HEAD as u64)?;
    Ok((crc32(&json) == crc).then(|| serde_json::from_slice(&json).ok()).flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(sequence: u64) -> Record {
        Record { sequence, hashes: vec!["ab".repeat(32)], sections: vec![(u32::MAX, u64::MAX); 3], ..Record::default() }
    }

    #[test]
    fn of_two_records_a_damaged_one_is_not_read() {
        let file = tempfile::tempfile().unwrap();
        let output = Output::of(file.try_clone().unwrap());
        let slots = Slots::new(1000, 3, 1);
        slots.clear(&output).unwrap();
        let sequences = || read(&file).unwrap().iter().map(|r| r.sequence).collect::<Vec<_>>();
        assert!(sequences().is_empty());
        (1..=3).for_each(|n| slots.write(&output, &record(n)).unwrap());
        assert_eq!(sequences(), [3, 2]);
        output.write_at(b"?", 1000 + slots.len + 20).unwrap();
        assert_eq!(sequences(), [2]);
        output.write_at(&u32::MAX.to_le_bytes(), 1000).unwrap();
        assert!(sequences().is_empty());
        file.set_len(2000).unwrap();
        assert!(sequences().is_empty());
    }

    #[test]
    fn a_slot_has_room_for_every_record() {
        let (sections, files) = (5000, 100);
        let mut full = record(u64::MAX);
        full.sections = vec![(u32::MAX, u64::MAX); sections];
        full.hashes = vec!["ab".repeat(32); files];
        full.roles = (0..40).map(|role| (role, RoleSums::default())).collect();
        let slots = Slots::new(0, sections, files);
        let file = tempfile::tempfile().unwrap();
        slots.write(&Output::of(file), &full).unwrap();
    }
}
