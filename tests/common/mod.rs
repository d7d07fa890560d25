//! Helpers that the test binaries share: devices, the program, small packs, and bytes of a pack
//! changed in place.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part of this")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

#[cfg(feature = "gpu")]
mod gpu;
pub mod naive;
#[cfg(feature = "cli")]
pub mod program;
pub mod replay;
pub mod run;
pub mod seal;

#[cfg(feature = "gpu")]
pub use gpu::{gpu, gpu_with, own_gpu};

use nf4pack::format::nf4::{ScaleType, Scales, block_count};
use nf4pack::format::{Entry, FloatType, FormatError, Index, Layout, Pack, Role, SectionKind, Shape, Storage, check};

/// Writes a pack of the bundled model, tiny-qwen3, with the default options. The tests of a binary
/// share one conversion: the encoder is slow without optimisation.
#[cfg(feature = "convert")]
pub fn write_tiny(path: &std::path::Path) {
    use nf4pack::convert::{Options, convert};

    static PACK: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    let once = || {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-qwen3");
        convert(source.as_ref(), path, Options::default(), &()).unwrap();
        std::fs::read(path).unwrap()
    };
    std::fs::write(path, PACK.get_or_init(once)).unwrap();
}

/// Offsets of the header's fields, as section 2 of the specification lists them.
pub mod header {
    pub const MAJOR: usize = 8;
    pub const MINOR: usize = 10;
    pub const RESERVED_A: usize = 12;
    pub const REQUIRED: usize = 16;
    pub const OPTIONAL: usize = 24;
    pub const FILE_LEN: usize = 32;
    pub const INDEX_OFFSET: usize = 40;
    pub const INDEX_LEN: usize = 48;
    pub const SECTION_COUNT: usize = 56;
    pub const NAME_COUNT: usize = 64;
    pub const METADATA_OFFSET: usize = 72;
    pub const METADATA_LEN: usize = 80;
    pub const INDEX_CRC: usize = 88;
    pub const METADATA_CRC: usize = 92;
    pub const LAYER_COUNT: usize = 96;
    pub const RESERVED_B: usize = 100;
    pub const CRC: usize = 124;
    pub const LEN: usize = 128;
}

/// Offsets of a section record's fields, as section 4 of the specification lists them.
pub mod record {
    pub const KIND: usize = 0;
    pub const FLAGS: usize = 2;
    pub const ROLE: usize = 4;
    pub const ELEMENT_TYPE: usize = 6;
    pub const SCALE_TYPE: usize = 8;
    pub const RANK: usize = 10;
    pub const BLOCK_SIZE: usize = 12;
    pub const LAYER: usize = 16;
    pub const EXPERT: usize = 20;
    pub const NAME: usize = 24;
    pub const OFFSET: usize = 32;
    pub const LENGTH: usize = 40;
    pub const SHAPE: usize = 48;
    pub const CRC: usize = 80;
    pub const RESERVED: usize = 84;
    pub const LEN: usize = 96;
}

/// Where field `field` of record `section` is.
pub fn field(section: usize, field: usize) -> usize {
    header::LEN + record::LEN * section + field
}

/// Overwrites bytes at `offset`.
pub fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

/// The u64 at `offset`.
pub fn get_u64(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

/// One tensor or file and its payloads (two for a quantised tensor).
#[derive(Debug, Clone)]
pub struct Item {
    pub entry: Entry,
    pub payloads: Vec<Vec<u8>>,
}

impl Item {
    pub fn new(name: &str, storage: Storage, shape: &[u64], payloads: Vec<Vec<u8>>) -> Self {
        let shape = Shape::new(shape).expect("a shape of a test");
        Self {
            entry: Entry { name: name.to_owned(), role: Role::Other, layer: None, expert: None, shape, storage },
            payloads,
        }
    }

    pub fn file(name: &str, bytes: &[u8]) -> Self {
        Self::new(name, Storage::File, &[bytes.len() as u64], vec![bytes.to_vec()])
    }

    /// A raw tensor whose bytes count upwards.
    pub fn raw(name: &str, float_type: FloatType, shape: &[u64]) -> Self {
        let len = shape.iter().product::<u64>() as usize * float_type.size();
        Self::new(name, Storage::Raw(float_type), shape, vec![(0..len).map(|i| (i * 37 + 1) as u8).collect()])
    }

    /// A quantised tensor with codes that go round, and the scale table given.
    pub fn nf4(name: &str, shape: &[u64], block_size: u32, scale_type: ScaleType, scales: Vec<u8>) -> Self {
        let codes = codes(shape.iter().product(), block_size);
        Self::new(name, Storage::Nf4 { scale_type, block_size }, shape, vec![codes, scales])
    }

    pub fn role(mut self, role: Role) -> Self {
        self.entry.role = role;
        self
    }

    pub fn layer(mut self, layer: u32) -> Self {
        self.entry.layer = Some(layer);
        self
    }

    pub fn expert(mut self, expert: u32) -> Self {
        self.entry.expert = Some(expert);
        self
    }
}

/// Codes (13 * i + 5) % 16 for each element, then the padding code 7.
pub fn codes(elements: u64, block_size: u32) -> Vec<u8> {
    let padded = block_count(elements, block_size) * u64::from(block_size);
    let code = |i: u64| if i < elements { ((13 * i + 5) % 16) as u8 } else { 7 };
    (0..padded / 2).map(|i| code(2 * i) | code(2 * i + 1) << 4).collect()
}

/// A float32 scale table.
pub fn f32_scales(scales: &[f32]) -> Vec<u8> {
    scales.iter().flat_map(|s| s.to_le_bytes()).collect()
}

/// A bfloat16 scale table (the scales must be exact in bfloat16).
pub fn bf16_scales(scales: &[f32]) -> Vec<u8> {
    scales.iter().flat_map(|s| ((s.to_bits() >> 16) as u16).to_le_bytes()).collect()
}

/// A dq8 table: offset, a map of i / 256 for each i, super-scales, codes.
pub fn dq8_scales(offset: f32, super_scales: &[f32], codes: &[u8]) -> Vec<u8> {
    let map = (0..256).map(|i| i as f32 / 256.0);
    let floats = std::iter::once(offset).chain(map).chain(super_scales.iter().copied());
    floats.flat_map(f32::to_le_bytes).chain(codes.iter().copied()).collect()
}

/// Lays the items out; the layout's order is returned with their payloads in it.
pub fn layout(items: &[Item], layer_count: u32, metadata: &str) -> Result<(Layout, Vec<Vec<u8>>), FormatError> {
    let entries = items.iter().map(|i| i.entry.clone()).collect();
    let layout = Layout::new(entries, layer_count, metadata.len() as u64)?;
    let item = |entry: &Entry| items.iter().find(|i| i.entry == *entry).expect("an entry of the items");
    let payloads = layout.entries().iter().flat_map(|e| item(e).payloads.clone()).collect();
    Ok((layout, payloads))
}

/// A whole pack.
pub fn pack(items: &[Item], layer_count: u32, metadata: &str) -> Vec<u8> {
    let (layout, payloads) = layout(items, layer_count, metadata).expect("a layout that a reader accepts");
    let payloads: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
    layout.assemble(&payloads, metadata).expect("payloads of the planned lengths")
}

/// The items, the number of layers and the metadata of a pack, to be changed and assembled again.
pub fn unpack(bytes: &[u8]) -> (Vec<Item>, u32, String) {
    let index = Index::parse(bytes, bytes.len() as u64).expect("a pack that a reader accepts");
    let mut items: Vec<Item> = Vec::new();
    for section in index.sections() {
        let payload = bytes[section.offset as usize..section.end() as usize].to_vec();
        let storage = match section.kind.expect("a section of a known kind") {
            SectionKind::Scales => {
                items.last_mut().expect("codes before their scales").payloads.push(payload);
                continue;
            }
            SectionKind::File => Storage::File,
            SectionKind::Raw => Storage::Raw(section.element_type.float_type().expect("a float type")),
            SectionKind::Codes => {
                let scale_type = section.scale_type.expect("codes have a type of scales");
                Storage::Nf4 { scale_type, block_size: section.block_size }
            }
        };
        let mut item = Item::new(index.name(section), storage, section.shape.dims(), vec![payload]).role(section.role);
        (item.entry.layer, item.entry.expert) = (section.layer, section.expert);
        items.push(item);
    }
    (items, index.header().layer_count, index.metadata().to_owned())
}

/// The pack that the rejection and flip tests change: a file, two global tensors, two layers.
/// Sections: 0 file, 1 and 2 `a` and `b` (role other), 3 norm of layer 0, 4 and 5 codes and scales
/// of layer 0, 6 and 7 those of layer 1.
pub fn small_pack() -> Vec<u8> {
    let scales = dq8_scales(0.5, &[2.0], &[0, 128, 255]);
    let items = [
        Item::file("config.json", b"{}"),
        Item::raw("a", FloatType::F16, &[3]),
        Item::raw("b", FloatType::F32, &[2, 1]),
        Item::raw("norm", FloatType::Bf16, &[5]).role(Role::InputNorm).layer(0),
        Item::nf4("q", &[3, 11], 32, ScaleType::F32, f32_scales(&[1.5, 0.25])).role(Role::QProj).layer(0),
        Item::nf4("up", &[3, 1, 25], 32, ScaleType::Dq8, scales).role(Role::UpProj).layer(1),
    ];
    pack(&items, 2, r#"{"tool":"test"}"#)
}

/// Everything that is wrong with a pack: what refuses to open it, else all faults of its payloads.
pub fn faults(bytes: &[u8]) -> Vec<FormatError> {
    match Index::parse(bytes, bytes.len() as u64) {
        Err(error) => vec![error],
        Ok(index) => check::all(&Pack::new(bytes, &index).expect("an index of these bytes")),
    }
}

/// All weights of a quantised tensor, decoded by the formula of section 7 of the specification.
pub fn decode(tensor: &nf4pack::format::nf4::Nf4Tensor<'_>) -> Vec<f32> {
    let scales: &Scales<'_> = &tensor.scales;
    (0..tensor.elements as usize)
        .map(|i| {
            let code = tensor.codes[i / 2] >> (4 * (i % 2)) & 15;
            nf4pack::format::nf4::CODEBOOK[usize::from(code)] * scales.get(i / tensor.block_size as usize)
        })
        .collect()
}
