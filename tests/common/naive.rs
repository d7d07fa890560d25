//! A second reader, written from the specification alone and for good packs only: it shares no code
//! with the crate, and panics at what it does not understand.

/// One section as the naive reader sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Section {
    pub kind: u16,
    pub role: u16,
    pub element_type: u16,
    pub scale_type: u16,
    pub block_size: u32,
    pub layer: Option<u32>,
    pub expert: Option<u32>,
    pub name: String,
    pub shape: Vec<u64>,
    pub payload: Vec<u8>,
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from(b[at]) | u16::from(b[at + 1]) << 8
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from(u16_at(b, at)) | u32::from(u16_at(b, at + 2)) << 16
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

fn f32_at(b: &[u8], at: usize) -> f32 {
    f32::from_bits(u32_at(b, at))
}

/// CRC-32, bit by bit.
pub fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// The metadata and all sections.
pub fn read(b: &[u8]) -> (String, Vec<Section>) {
    assert_eq!(b[..8], *b"\x89NF4\r\n\x1a\n");
    assert_eq!(u16_at(b, 8), 1, "major version");
    assert_eq!(u64_at(b, 32), b.len() as u64, "file length");
    assert_eq!(u32_at(b, 124), crc32(&b[..124]), "header CRC");
    let index = &b[128..128 + u64_at(b, 48) as usize];
    assert_eq!(u32_at(b, 88), crc32(index), "index CRC");
    let (start, len) = (u64_at(b, 72) as usize, u64_at(b, 80) as usize);
    let metadata = &b[start..start + len];
    assert_eq!(u32_at(b, 92), crc32(metadata), "metadata CRC");
    let (count, names) = (u64_at(b, 56) as usize, u64_at(b, 64) as usize);
    let ends = &index[96 * count..];
    let text = &ends[8 * names..];
    let name = |i: usize| {
        let start = if i == 0 { 0 } else { u64_at(ends, 8 * (i - 1)) as usize };
        String::from_utf8(text[start..u64_at(ends, 8 * i) as usize].to_vec()).unwrap()
    };
    let sections = (0..count).map(|i| section(b, &index[96 * i..96 * (i + 1)], name)).collect();
    (String::from_utf8(metadata.to_vec()).unwrap(), sections)
}

fn section(b: &[u8], r: &[u8], name: impl Fn(usize) -> String) -> Section {
    let none = |n: u32| (n != 0xffff_ffff).then_some(n);
    let (offset, length) = (u64_at(r, 32) as usize, u64_at(r, 40) as usize);
    let payload = b[offset..offset + length].to_vec();
    assert_eq!(u32_at(r, 80), crc32(&payload), "payload CRC");
    Section {
        kind: u16_at(r, 0),
        role: u16_at(r, 4),
        element_type: u16_at(r, 6),
        scale_type: u16_at(r, 8),
        block_size: u32_at(r, 12),
        layer: none(u32_at(r, 16)),
        expert: none(u32_at(r, 20)),
        name: name(u64_at(r, 24) as usize),
        shape: (0..usize::from(u16_at(r, 10))).map(|i| u64_at(r, 48 + 8 * i)).collect(),
        payload,
    }
}

const CODEBOOK: [u32; 16] = [
    0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000, 0x3da2faff, 0x3e24cae3,
    0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000,
];

/// The scale of block `i`.
fn scale(table: &[u8], scale_type: u16, blocks: usize, i: usize) -> f32 {
    match scale_type {
        1 => f32_at(table, 4 * i),
        2 => f32::from_bits(u32::from(u16_at(table, 2 * i)) << 16),
        3 => {
            let super_scales = 4 + 1024;
            let codes = super_scales + 4 * blocks.div_ceil(256);
            let code = usize::from(table[codes + i]);
            let product = f32_at(table, 4 + 4 * code) * f32_at(table, super_scales + 4 * (i / 256));
            product + f32_at(table, 0)
        }
        other => panic!("scale type {other}"),
    }
}

/// The weights of a projection, from its codes section and the scales section behind it.
pub fn weights(codes: &Section, scales: &Section) -> Vec<f32> {
    assert_eq!((codes.kind, scales.kind), (1, 2));
    let elements = codes.shape.iter().product::<u64>() as usize;
    let block = codes.block_size as usize;
    let value = |i: usize| {
        let code = u32_at(&codes.payload, 4 * (i / 8)) >> (4 * (i % 8)) & 15;
        f32::from_bits(CODEBOOK[code as usize])
            * scale(&scales.payload, codes.scale_type, elements.div_ceil(block), i / block)
    };
    (0..elements).map(value).collect()
}

/// The values of a raw tensor, widened to float64 (float16 by arithmetic).
pub fn raw_values(section: &Section) -> Vec<f64> {
    let p = &section.payload;
    match section.element_type {
        1 => (0..p.len() / 4).map(|i| f64::from(f32_at(p, 4 * i))).collect(),
        2 => (0..p.len() / 2).map(|i| half(u16_at(p, 2 * i))).collect(),
        3 => (0..p.len() / 2).map(|i| f64::from(f32::from_bits(u32::from(u16_at(p, 2 * i)) << 16))).collect(),
        other => panic!("element type {other}"),
    }
}

fn half(bits: u16) -> f64 {
    let (sign, exponent, fraction) = (bits >> 15, bits >> 10 & 31, f64::from(bits & 1023));
    let magnitude = match exponent {
        0 => fraction * 2f64.powi(-24),
        31 => panic!("not finite"),
        e => (1024.0 + fraction) * 2f64.powi(i32::from(e) - 25),
    };
    if sign == 1 { -magnitude } else { magnitude }
}
