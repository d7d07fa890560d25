//! A good pack with some of its fields changed, its records moved and its payloads touched, and all
//! checksums made right: the reader gets past them, so each rule of the format is reached within
//! few mutations. What holds for any bytes holds here, too.

use arbitrary::{Result, Unstructured};

use super::{parse, seal};

/// Packs with every kind of section, scales and optional field between them.
const PACKS: [&[u8]; 5] = [
    include_bytes!("../../tests/fixtures/golden/v1.0.nf4pack"),
    include_bytes!("../../tests/fixtures/golden/v1.0-full.nf4pack"),
    include_bytes!("../../tests/fixtures/golden/v1.0-signed.nf4pack"),
    include_bytes!("../../tests/fixtures/golden/v1.0-fused.nf4pack"),
    include_bytes!("../../tests/fixtures/golden/v1.0-output-norms.nf4pack"),
];

const HEADER_LEN: usize = 128;
const RECORD_LEN: usize = 96;

/// Offsets and widths of the fields of the header, except the checksums (section 2 of the
/// specification).
const HEADER: [(usize, usize); 15] = [
    (0, 8),
    (8, 2),
    (10, 2),
    (12, 4),
    (16, 8),
    (24, 8),
    (32, 8),
    (40, 8),
    (48, 8),
    (56, 8),
    (64, 8),
    (72, 8),
    (80, 8),
    (96, 4),
    (100, 8),
];

/// Those of a section's record (section 4).
const RECORD: [(usize, usize); 17] = [
    (0, 2),
    (2, 2),
    (4, 2),
    (6, 2),
    (8, 2),
    (10, 2),
    (12, 4),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 8),
    (40, 8),
    (48, 8),
    (56, 8),
    (64, 8),
    (72, 8),
    (84, 8),
];

/// Numbers at the edges of what fields may be.
const EDGES: [u64; 14] = [0, 1, 2, 7, 32, 63, 64, 255, 256, 4096, 0xffff, 0xffff_ffff, i64::MAX.cast_unsigned(), u64::MAX];

/// Runs the check.
pub fn run(bytes: &[u8]) {
    // Too few bytes for a list of edits are no input.
    let _ = edited(&mut Unstructured::new(bytes)).map(|pack| parse::parse(&pack));
}

/// The changed pack.
fn edited(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut pack = u.choose(&PACKS)?.to_vec();
    for _ in 0..u.int_in_range(1..=6)? {
        edit(u, &mut pack)?;
    }
    if u.ratio(15, 16)? {
        seal::seal_payloads(&mut pack);
    }
    Ok(pack)
}

/// Changes one thing.
fn edit(u: &mut Unstructured<'_>, pack: &mut Vec<u8>) -> Result<()> {
    let record = |u: &mut Unstructured<'_>, pack: &[u8]| Ok(HEADER_LEN + RECORD_LEN * u.choose_index(sections(pack))?);
    match u.int_in_range(0..=9)? {
        0 | 1 => {
            let &(at, width) = u.choose(&HEADER)?;
            change(u, pack, at, width)?;
        }
        2..=4 => {
            let start = record(u, pack)?;
            let &(at, width) = u.choose(&RECORD)?;
            change(u, pack, start + at, width)?;
        }
        5 => {
            // One record in another's place, or both exchanged.
            let (from, to) = (record(u, pack)?, record(u, pack)?);
            let both = [from, to].map(|at| pack.get(at..at + RECORD_LEN).map(<[u8]>::to_vec));
            let [Some(first), Some(second)] = both else { return Ok(()) };
            put(pack, to, &first);
            if u.arbitrary()? {
                put(pack, from, &second);
            }
        }
        6 => {
            // The end of a name, or one of its bytes.
            let names = HEADER_LEN + RECORD_LEN * sections(pack);
            if u.arbitrary()? {
                let at = names + 8 * u.int_in_range(0..=20)?;
                change(u, pack, at, 8)?;
            } else {
                let at = names + u.int_in_range(0..=600)?;
                change(u, pack, at, 1)?;
            }
        }
        7 => {
            // Anything behind the front: metadata, padding, payloads.
            let at = u.choose_index(pack.len().max(1))?;
            change(u, pack, at, 1)?;
        }
        8 => {
            let len = u.int_in_range(0..=pack.len())?;
            pack.truncate(len);
            length_is_right(u, pack)?;
        }
        _ => {
            let more = u.int_in_range(1..=512)?;
            pack.resize(pack.len() + more, 0);
            length_is_right(u, pack)?;
        }
    }
    Ok(())
}

/// Half of the time, the header says the file's true length.
fn length_is_right(u: &mut Unstructured<'_>, pack: &mut [u8]) -> Result<()> {
    if u.arbitrary()? {
        let len = pack.len() as u64;
        put(pack, 32, &len.to_le_bytes());
    }
    Ok(())
}

/// How many records are in the file, at least one.
fn sections(pack: &[u8]) -> usize {
    let count = pack.get(56..64).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
    (count.min(pack.len() as u64 / RECORD_LEN as u64) as usize).max(1)
}

/// Gives a field another value: near its own, at an edge, that of other bytes of the front, or any.
fn change(u: &mut Unstructured<'_>, pack: &mut [u8], at: usize, width: usize) -> Result<()> {
    let read = |pack: &[u8], at: usize| {
        let mut value = [0; 8];
        if let Some(bytes) = pack.get(at..at + width) {
            value[..width].copy_from_slice(bytes);
        }
        u64::from_le_bytes(value)
    };
    let value = match u.int_in_range(0..=3)? {
        0 => read(pack, at).wrapping_add_signed(i64::from(u.arbitrary::<i8>()?)),
        1 => *u.choose(&EDGES)?,
        2 => read(pack, 4 * u.int_in_range(0..=700)?),
        _ => u.arbitrary()?,
    };
    put(pack, at, &value.to_le_bytes()[..width]);
    Ok(())
}

/// Overwrites bytes, where they are within the pack.
fn put(pack: &mut [u8], at: usize, value: &[u8]) {
    if let Some(bytes) = pack.get_mut(at..at + value.len()) {
        bytes.copy_from_slice(value);
    }
}
