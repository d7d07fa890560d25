//! A good pack of any tensors. `verify` finds nothing in it, and finds every change of one byte.
//! Where several bytes change and the checksums are made right again, the reader and `verify` agree
//! about what is wrong.

use std::fs;
use std::path::PathBuf;

use arbitrary::{Result, Unstructured};
use nf4pack::PackSource;
use nf4pack::format::nf4::{SUPER_BLOCK, ScaleType, Scales, ZERO_CODE};
use nf4pack::format::{Entry, Index, Layout, Pack, Section, SectionKind, check};
use nf4pack::verify::verify;

use super::{parse, roundtrip, seal};

/// Larger packs are not written.
const MAX_FILE_LEN: u64 = 1 << 16;

/// Runs the check.
pub fn run(bytes: &[u8]) {
    let _ = check(&mut Unstructured::new(bytes));
}

fn check(u: &mut Unstructured<'_>) -> Result<()> {
    let Some(mut pack) = good(u)? else { return Ok(()) };
    assert_eq!(faults(&pack), Some(Vec::new()), "what the writer wrote");
    if u.ratio(1, 8)? {
        compare_with_verify(&pack);
    }
    let at = u.choose_index(pack.len())?;
    let change: u8 = u.arbitrary::<u8>()?.max(1);
    pack[at] ^= change;
    assert!(faults(&pack).is_none_or(|faults| !faults.is_empty()), "byte {at} ^ {change} is not found");
    for _ in 0..u.int_in_range(0..=4)? {
        let at = u.choose_index(pack.len())?;
        pack[at] = u.arbitrary()?;
    }
    if u.ratio(7, 8)? {
        seal::seal_payloads(&mut pack);
    }
    parse::parse(&pack);
    if u.ratio(1, 8)? {
        compare_with_verify(&pack);
    }
    Ok(())
}

/// What is wrong with a pack; `None` where it does not open.
fn faults(bytes: &[u8]) -> Option<Vec<String>> {
    let index = Index::parse(bytes, bytes.len() as u64).ok()?;
    let pack = Pack::new(bytes, &index).expect("the index is of these bytes");
    Some(check::all(&pack).iter().map(ToString::to_string).collect())
}

/// `verify` opens what the reader opens, and finds what the checks in memory find.
fn compare_with_verify(bytes: &[u8]) {
    thread_local! {
        static FILE: PathBuf = std::env::temp_dir().join(format!("nf4pack-verify-{}.nf4pack", std::process::id()));
    }
    let found = FILE.with(|path| {
        fs::write(path, bytes).expect("a temporary file");
        let found = PackSource::open(path).ok().map(|pack| verify(&pack, 1, &()).expect("the file is whole"));
        let _ = fs::remove_file(path);
        found
    });
    let found = found.map(|report| report.faults.iter().map(ToString::to_string).collect());
    assert_eq!(found, faults(bytes));
}

/// A pack whose numbers are all right; `None` where the writer does not take the tensors.
fn good(u: &mut Unstructured<'_>) -> Result<Option<Vec<u8>>> {
    let layers = u.int_in_range(0..=3)?;
    let entries = (0..u.int_in_range(0..=5)?).map(|_| roundtrip::entry(u)).collect::<Result<Vec<Entry>>>()?;
    let Ok(layout) = Layout::new(entries, layers, 2) else { return Ok(None) };
    if layout.file_len() > MAX_FILE_LEN {
        return Ok(None);
    }
    let payloads = layout.sections().iter().map(|section| payload(u, section)).collect::<Result<Vec<_>>>()?;
    let slices: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
    Ok(Some(layout.assemble(&slices, "{}").expect("the planned lengths")))
}

/// A payload without faults.
fn payload(u: &mut Unstructured<'_>, section: &Section) -> Result<Vec<u8>> {
    let seed: [u8; 7] = u.arbitrary()?;
    let any = |len: u64| seed.into_iter().cycle().take(len as usize);
    Ok(match (section.kind, section.scale_type) {
        (Some(SectionKind::Codes), _) => {
            let mut codes: Vec<u8> = any(section.length).collect();
            for element in section.shape.elements()..2 * section.length {
                let (byte, shift) = ((element / 2) as usize, 4 * (element % 2));
                codes[byte] = codes[byte] & !(15 << shift) | ZERO_CODE << shift;
            }
            codes
        }
        (Some(SectionKind::Scales), Some(ScaleType::F32)) => floats(any(section.length / 4)),
        (Some(SectionKind::Scales), Some(ScaleType::Bf16)) => any(section.length / 2).flat_map(|b| [b, 0x3d]).collect(),
        (Some(SectionKind::Scales), Some(ScaleType::Dq8)) => {
            let blocks = section.length - Scales::DQ8_FIXED_LEN as u64;
            // 4 bytes for each super-block, 1 for each block of it.
            let supers = blocks.div_ceil(SUPER_BLOCK as u64 + 4);
            let table = floats(any(1 + 256 + supers));
            let codes = any(section.length - table.len() as u64);
            table.into_iter().chain(codes).collect()
        }
        _ => any(section.length).collect(),
    })
}

/// Numbers from 1 to 256.
fn floats(bytes: impl Iterator<Item = u8>) -> Vec<u8> {
    bytes.flat_map(|byte| (f32::from(byte) + 1.0).to_le_bytes()).collect()
}
