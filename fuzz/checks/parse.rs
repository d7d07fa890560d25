//! Any bytes: the reader does not panic, and what it accepts holds what it promises. The bytes are
//! tried as they are, and once more with length and checksums made right, so that mutations get
//! past them.

use nf4pack::format::nf4::CODEBOOK;
use nf4pack::format::{
    Entry, FormatError, Index, Layout, Limits, Pack, Provenance, QuantizedTensor, Section, SectionKind, Storage,
};
use nf4pack::format::{check, crc32};

use super::seal;

/// Runs the check.
pub fn run(bytes: &[u8]) {
    parse(bytes);
    let mut sealed = bytes.to_vec();
    let len = sealed.len() as u64;
    if let Some(file_len) = sealed.get_mut(32..40) {
        file_len.copy_from_slice(&len.to_le_bytes());
    }
    seal::seal_payloads(&mut sealed);
    parse(&sealed);
    lie_about_the_length(&sealed);
}

/// A front whose file is said to be of any length, under limits that allow everything.
fn lie_about_the_length(bytes: &[u8]) {
    let file_len = bytes.first_chunk().map_or(u64::MAX, |b| u64::from_le_bytes(*b));
    let (all, all_u32) = (u64::MAX, u32::MAX);
    let limits = Limits {
        sections: all,
        name_len: all,
        index_len: all,
        metadata_len: all,
        layers: all_u32,
        experts: all_u32,
        file_len: all,
        config_len: all,
    };
    for len in [file_len, u64::MAX, bytes.len() as u64] {
        let _ = Index::parse_with(bytes, len, &limits);
    }
}

/// What holds for bytes that are read as they are.
pub fn parse(bytes: &[u8]) {
    let index = match Index::parse(bytes, bytes.len() as u64) {
        Ok(index) => index,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let pack = Pack::new(bytes, &index).expect("the index is of these bytes");
    sections(&pack);
    views(&pack);
    let faults = check::all(&pack);
    for fault in &faults {
        assert!(!fault.to_string().is_empty());
        let expected = matches!(
            fault,
            FormatError::PayloadChecksum { .. }
                | FormatError::ScaleNotFinite { .. }
                | FormatError::ScaleNegative { .. }
                | FormatError::CodePadding { .. }
                | FormatError::Padding { .. }
        );
        assert!(expected, "a fault of a payload: {fault}");
    }
    if faults.is_empty() {
        rebuild(&pack);
    }
    let _ = Provenance::from_json(index.metadata());
}

/// Every section is inside the file, aligned, behind the one before, named, and encodes to its
/// record.
fn sections(pack: &Pack<'_>) {
    let index = pack.index();
    let header = index.header();
    assert_eq!(&header.encode()[..], &pack.bytes()[..128]);
    let mut end = header.front_len();
    for (number, section) in index.sections().iter().enumerate() {
        assert!(section.offset >= end && section.offset.is_multiple_of(256));
        end = section.end();
        assert_eq!(pack.payload(section).len() as u64, section.length);
        assert!(!index.name(section).is_empty() && section.shape.elements() > 0);
        assert!(!check::describe(index, section).is_empty());
        if section.kind.is_some() {
            assert_eq!(&section.encode()[..], &pack.bytes()[128 + 96 * number..][..96]);
        }
    }
    assert_eq!(end, header.file_len);
}

/// Every view, and all that can be asked of it.
fn views(pack: &Pack<'_>) {
    let (mut in_layers, mut bytes_seen) = (0, 0_u64);
    for layer in pack.layers() {
        let range = layer.file_range();
        assert!(range.start.is_multiple_of(4096) && range.end - range.start == layer.bytes().len() as u64);
        assert!(layer.sections().iter().all(|s| s.layer == Some(layer.number())));
        in_layers += layer.sections().len();
        layer.quantized_tensors().for_each(|p| assert_eq!(p.layer, Some(layer.number())));
        layer.raw_tensors().for_each(|t| assert!(!t.bytes.is_empty()));
        for projection in layer.quantized_tensors() {
            assert!(layer.quantized_tensor(projection.role).is_some());
        }
        bytes_seen += layer.bytes().len() as u64;
    }
    assert!(pack.layer(pack.layer_count()).is_none() && bytes_seen <= pack.bytes().len() as u64);
    let of_layers = pack.index().sections().iter().filter(|s| s.layer.is_some()).count();
    assert_eq!(in_layers, of_layers);
    for projection in pack.quantized_tensors() {
        weights(&projection);
        assert_eq!(
            pack.quantized_tensor(projection.name).map(|p| p.data.codes.as_ptr()),
            Some(projection.data.codes.as_ptr())
        );
    }
    for tensor in pack.raw_tensors() {
        assert_eq!(tensor.bytes.len() as u64, tensor.shape.elements() * tensor.float_type.size() as u64);
        assert_eq!(pack.raw_tensor(tensor.name), Some(tensor));
    }
    for file in pack.files() {
        assert_eq!(pack.file(file.name), Some(file));
        assert!(!file.name.contains(['/', '\\']));
    }
}

/// The first and the last weight of a projection can be read.
fn weights(projection: &QuantizedTensor<'_>) {
    let data = &projection.data;
    assert_eq!(data.elements, projection.shape.elements());
    assert!(!data.scales.is_empty());
    assert_eq!(data.scales.len() as u64, data.elements.div_ceil(u64::from(data.block_size)));
    for element in [0, data.elements - 1] {
        let code = data.codes[(element / 2) as usize] >> (4 * (element % 2)) & 15;
        let scale = data.scales.get((element / u64::from(data.block_size)) as usize);
        std::hint::black_box(CODEBOOK[usize::from(code)] * scale);
    }
    let mut last_two = [0.0; 2];
    data.scales.read(data.scales.len() - 1, &mut last_two);
    assert!(last_two[1].is_nan(), "past the end there is no scale");
}

/// A pack without faults is the only one of its tensors: laying them out again gives the same
/// bytes.
fn rebuild(pack: &Pack<'_>) {
    let index = pack.index();
    let header = index.header();
    if header.minor_version != 0 || header.optional_features != 0 || index.sections().iter().any(|s| s.kind.is_none()) {
        return;
    }
    let entries = index.sections().iter().filter_map(|section| entry(index, section)).collect();
    let layout = Layout::new(entries, header.layer_count, header.metadata_len).expect("a reader accepted these tensors");
    let crcs: Vec<u32> = index.sections().iter().map(|s| crc32(pack.payload(s))).collect();
    let front = layout.front(&crcs, header.required_features, index.metadata()).expect("the same lengths");
    assert!(pack.bytes().starts_with(&front), "the same tensors have one front");
    assert_eq!(layout.file_len(), header.file_len);
}

/// What the writer would have been given for a section; `None` for scales, which their codes stand
/// for.
fn entry(index: &Index, section: &Section) -> Option<Entry> {
    let storage = match section.kind? {
        SectionKind::Codes => Storage::Nf4 { scale_type: section.scale_type?, block_size: section.block_size },
        SectionKind::Scales => return None,
        SectionKind::Raw => Storage::Raw(section.element_type.float_type()?),
        SectionKind::File => Storage::File,
    };
    let (name, shape) = (index.name(section).to_owned(), section.shape);
    Some(Entry { name, role: section.role, layer: section.layer, expert: section.expert, shape, storage })
}
