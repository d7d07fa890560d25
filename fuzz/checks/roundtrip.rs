//! Any tensors: the writer refuses them, or writes a pack that gives them back.

use arbitrary::{Result, Unstructured};
use nf4pack::format::nf4::{BLOCK_SIZES, ScaleType};
use nf4pack::format::{Entry, FloatType, FormatError, Index, Layout, Pack, Role, SectionKind, Shape, Storage, check};

/// Packs larger than this are laid out, but not written.
const MAX_FILE_LEN: u64 = 1 << 18;

/// Runs the check.
pub fn run(bytes: &[u8]) {
    // Too few bytes for a list of tensors are no input.
    let _ = roundtrip(&mut Unstructured::new(bytes));
}

fn roundtrip(u: &mut Unstructured<'_>) -> Result<()> {
    let layer_count = u.int_in_range(0..=4)?;
    let metadata: String = u.arbitrary()?;
    let count = u.int_in_range(0..=8)?;
    let entries = (0..count).map(|_| entry(u)).collect::<Result<Vec<Entry>>>()?;
    let Ok(layout) = Layout::new(entries.clone(), layer_count, metadata.len() as u64) else { return Ok(()) };
    if layout.file_len() > MAX_FILE_LEN {
        return Ok(());
    }
    let payloads = layout.sections().iter().map(|s| payload(u, s.length as usize)).collect::<Result<Vec<_>>>()?;
    let slices: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
    let bytes = layout.assemble(&slices, &metadata).expect("the planned lengths");
    assert_eq!(bytes.len() as u64, layout.file_len());
    compare(&bytes, &entries, &payloads, &metadata);
    Ok(())
}

/// A tensor or a file, mostly one that the writer takes.
pub fn entry(u: &mut Unstructured<'_>) -> Result<Entry> {
    let storage = match u.int_in_range(0..=4)? {
        0 | 1 => Storage::Nf4 {
            scale_type: *u.choose(&[ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8])?,
            block_size: if u.ratio(15, 16)? { *u.choose(&BLOCK_SIZES)? } else { u.arbitrary()? },
        },
        2 | 3 => Storage::Raw(*u.choose(&[FloatType::F32, FloatType::F16, FloatType::Bf16])?),
        _ => Storage::File,
    };
    let file = storage == Storage::File;
    let rank = if file { 1 } else { u.int_in_range(1..=4)? };
    // Up to a few hundred elements, mostly.
    let usual = [300, 40, 9, 5][rank - 1];
    let dim = |u: &mut Unstructured<'_>| match u.int_in_range(0..=31)? {
        0..=28 => u.int_in_range(1..=usual),
        29 | 30 => u.int_in_range(1..=40),
        _ => u.arbitrary(),
    };
    let dims = (0..rank).map(|_| dim(u)).collect::<Result<Vec<u64>>>()?;
    Ok(Entry {
        name: name(u)?,
        role: if file { Role::Other } else { *u.choose(Role::ALL)? },
        layer: if file { None } else { u.arbitrary::<Option<u8>>()?.map(|l| u32::from(l % 5)) },
        expert: if file { None } else { u.arbitrary::<Option<u16>>()?.map(u32::from) },
        shape: Shape::new(&dims).ok_or(arbitrary::Error::IncorrectFormat)?,
        storage,
    })
}

/// Mostly a short plain name, so that files are accepted, and names differ or not.
fn name(u: &mut Unstructured<'_>) -> Result<String> {
    if u.ratio(1, 8)? {
        return u.arbitrary();
    }
    Ok(format!("{}{}", u.choose(&["config.json", "w", "model.layers.0."])?, u.arbitrary::<u8>()? % 16))
}

/// As many bytes as are left, gone round.
fn payload(u: &mut Unstructured<'_>, len: usize) -> Result<Vec<u8>> {
    let seed: [u8; 7] = u.arbitrary()?;
    let mut bytes = seed.repeat(len.div_ceil(seed.len()));
    bytes.truncate(len);
    Ok(bytes)
}

fn compare(bytes: &[u8], entries: &[Entry], payloads: &[Vec<u8>], metadata: &str) {
    let index = Index::parse(bytes, bytes.len() as u64).expect("what the writer wrote");
    let pack = Pack::new(bytes, &index).expect("its own index");
    assert_eq!(index.metadata(), metadata);
    assert!(index.sections().iter().map(|s| pack.payload(s)).eq(payloads.iter().map(Vec::as_slice)));
    let (mut projections, mut raws, mut files) = (0, 0, 0);
    for entry in entries {
        match entry.storage {
            Storage::Nf4 { scale_type, block_size } => {
                let found = pack.quantized_tensors().find(|p| p.name == entry.name).expect("each projection");
                assert_eq!((found.role, found.layer, found.expert), (entry.role, entry.layer, entry.expert));
                assert_eq!((found.shape, found.data.block_size), (&entry.shape, block_size));
                assert_eq!(found.data.scales.scale_type(), scale_type);
                projections += 1;
            }
            Storage::Raw(float_type) => {
                let found = pack.raw_tensor(&entry.name).expect("each raw tensor");
                assert_eq!((found.role, found.layer, found.expert), (entry.role, entry.layer, entry.expert));
                assert_eq!((found.shape, found.float_type), (&entry.shape, float_type));
                raws += 1;
            }
            Storage::File => {
                assert_eq!(pack.file(&entry.name).expect("each file").bytes.len() as u64, entry.shape.elements());
                files += 1;
            }
        }
    }
    assert_eq!(
        (pack.quantized_tensors().count(), pack.raw_tensors().count(), pack.files().count()),
        (projections, raws, files)
    );
    faults(&pack);
}

/// The payloads are any bytes, so scales may be no numbers and padding codes not 7; all else is
/// right.
fn faults(pack: &Pack<'_>) {
    for fault in check::all(pack) {
        let (section, kind) = match fault {
            FormatError::ScaleNotFinite { section, .. } => (section, SectionKind::Scales),
            FormatError::CodePadding { section, .. } => (section, SectionKind::Codes),
            other => panic!("the writer made a fault: {other}"),
        };
        assert_eq!(pack.index().sections()[section as usize].kind, Some(kind));
    }
}
