//! What the bytes mean: the NF4 codebook, the block rule, the order of codes in a word, the scale
//! tables (spec section 7). Everything that encodes or decodes takes these meanings from here.

use half::bf16;

/// The 16 values of 4-bit NormalFloat (Dettmers et al., *QLoRA*, 2023, appendix E), as bitsandbytes
/// stores them in float32.
pub const CODEBOOK: [f32; 16] = {
    let bits: [u32; 16] = [
        0xbf80_0000,
        0xbf32_39b1,
        0xbf06_6b30,
        0xbeca_32a0,
        0xbe91_a24d,
        0xbe3d_353f,
        0xbdba_7871,
        0x0000_0000,
        0x3da2_faff,
        0x3e24_cae3,
        0x3e7c_04dd,
        0x3ead_033a,
        0x3ee1_a4b8,
        0x3f10_07ab,
        0x3f39_13b3,
        0x3f80_0000,
    ];
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        values[i] = f32::from_bits(bits[i]);
        i += 1;
    }
    values
};

/// The float32 midpoints between neighbouring entries of [`CODEBOOK`].
///
/// A normalised weight `s` gets the code "number of midpoints strictly below `s`", so a tie takes
/// the lower code.
pub const MIDPOINTS: [f32; 15] = {
    let mut values = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        values[i] = (CODEBOOK[i] + CODEBOOK[i + 1]) * 0.5;
        i += 1;
    }
    values
};

/// The code whose value is 0.0; it pads the last block of a tensor.
pub const ZERO_CODE: u8 = 7;

/// A codes word made of eight [`ZERO_CODE`]s.
pub const ZERO_WORD: u32 = 0x7777_7777;

/// Codes in one little-endian u32: element `i` of a tensor sits at bits `4 * (i % 8)` of word `i /
/// 8`.
pub const CODES_PER_WORD: usize = 8;

/// The block sizes that a pack may use.
pub const BLOCK_SIZES: [u32; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The default block size of the converter.
pub const DEFAULT_BLOCK_SIZE: u32 = 64;

/// Scales that share one float32 super-scale in a `dq8` table.
pub const SUPER_BLOCK: usize = 256;

/// Largest distance between a value in [-1, 1] and its nearest codebook entry: half the gap between
/// codes 0 and 1.
pub const MAX_UNIT_ERROR: f32 = (CODEBOOK[1] - CODEBOOK[0]) * 0.5;

/// How the scales of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ScaleType {
    /// One float32 per block.
    F32,
    /// One bfloat16 per block.
    Bf16,
    /// One byte per block into a 256-entry float32 map, times one float32 per [`SUPER_BLOCK`]
    /// blocks, plus one float32 offset per tensor: the nested ("double") quantisation of
    /// bitsandbytes.
    Dq8,
}

/// The scale table of one tensor, as it lies in the file (little-endian bytes; spec section 7.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scales<'a> {
    /// `4 * blocks` bytes.
    F32(&'a [u8]),
    /// `2 * blocks` bytes.
    Bf16(&'a [u8]),
    /// Nested scales: `map[codes[i]] * super_scales[i / 256] + offset`.
    Dq8 {
        /// Added to every scale.
        offset: f32,
        /// 256 float32 values, 1024 bytes.
        map: &'a [u8],
        /// `4 * ceil(blocks / 256)` bytes.
        super_scales: &'a [u8],
        /// One byte a block.
        codes: &'a [u8],
    },
}

/// Reads the `i`-th little-endian float32 of `bytes`; NaN past the end, so that a wrong index can
/// never look like data.
fn f32_at(bytes: &[u8], i: usize) -> f32 {
    bytes.get(4 * i..4 * i + 4).and_then(|b| b.try_into().ok()).map_or(f32::NAN, f32::from_le_bytes)
}

impl<'a> Scales<'a> {
    /// Bytes of a `dq8` table ahead of its super-scales: the offset and the map.
    pub const DQ8_FIXED_LEN: usize = 4 + 4 * 256;

    /// Splits the payload of a scales section of `blocks` scales; `None` where its length is not
    /// the one that [`scales_len`] gives.
    pub fn from_payload(payload: &'a [u8], scale_type: ScaleType, blocks: usize) -> Option<Self> {
        if scales_len(blocks as u64, scale_type) != Some(payload.len() as u64) {
            return None;
        }
        Some(match scale_type {
            ScaleType::F32 => Self::F32(payload),
            ScaleType::Bf16 => Self::Bf16(payload),
            ScaleType::Dq8 => {
                let (fixed, rest) = payload.split_at_checked(Self::DQ8_FIXED_LEN)?;
                let (super_scales, codes) = rest.split_at_checked(4 * blocks.div_ceil(SUPER_BLOCK))?;
                Self::Dq8 { offset: f32_at(fixed, 0), map: fixed.get(4..)?, super_scales, codes }
            }
        })
    }

    /// How the table is stored.
    pub fn scale_type(&self) -> ScaleType {
        match self {
            Self::F32(_) => ScaleType::F32,
            Self::Bf16(_) => ScaleType::Bf16,
            Self::Dq8 { .. } => ScaleType::Dq8,
        }
    }

    /// Number of scales (one per block).
    pub fn len(&self) -> usize {
        match self {
            Self::F32(bytes) => bytes.len() / 4,
            Self::Bf16(bytes) => bytes.len() / 2,
            Self::Dq8 { codes, .. } => codes.len(),
        }
    }

    /// Whether the table holds no scale at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The scale of block `i` in float32; NaN past the end.
    ///
    /// A `dq8` scale is a product rounded to float32, then a sum rounded to float32 (never a fused
    /// multiply-add).
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::F32(bytes) => f32_at(bytes, i),
            Self::Bf16(bytes) => bytes
                .get(2 * i..2 * i + 2)
                .and_then(|b| b.try_into().ok())
                .map_or(f32::NAN, |b| bf16::from_le_bytes(b).to_f32()),
            Self::Dq8 { offset, map, super_scales, codes } => codes
                .get(i)
                .map_or(f32::NAN, |&code| f32_at(map, usize::from(code)) * f32_at(super_scales, i / SUPER_BLOCK) + offset),
        }
    }

    /// Writes the scales of the blocks from `first` on into `out`.
    pub fn read(&self, first: usize, out: &mut [f32]) {
        for (i, scale) in out.iter_mut().enumerate() {
            *scale = self.get(first + i);
        }
    }
}

/// A quantised tensor as the file holds it: `value[i] = CODEBOOK[code[i]] * scale[i / block_size]`,
/// one float32 multiply.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Nf4Tensor<'a> {
    /// Packed codes, little-endian u32 words as bytes, in whole blocks: `blocks * block_size / 2`
    /// bytes.
    pub codes: &'a [u8],
    /// One scale per block.
    pub scales: Scales<'a>,
    /// Elements per block, one of [`BLOCK_SIZES`]. Blocks run over the flattened row-major tensor.
    pub block_size: u32,
    /// Number of weights, without the padding of the last block.
    pub elements: u64,
}

/// Blocks that `elements` weights take; the last one may be padded.
pub fn block_count(elements: u64, block_size: u32) -> u64 {
    elements.div_ceil(u64::from(block_size.max(1)))
}

/// Bytes of a codes section: whole blocks of half a byte a weight. `None` on overflow.
pub fn codes_len(elements: u64, block_size: u32) -> Option<u64> {
    block_count(elements, block_size).checked_mul(u64::from(block_size / 2))
}

/// Bytes of a scales section of `blocks` scales. `None` on overflow.
pub fn scales_len(blocks: u64, scale_type: ScaleType) -> Option<u64> {
    match scale_type {
        ScaleType::F32 => blocks.checked_mul(4),
        ScaleType::Bf16 => blocks.checked_mul(2),
        ScaleType::Dq8 => {
            let super_scales = blocks.div_ceil(SUPER_BLOCK as u64).checked_mul(4)?;
            blocks.checked_add(super_scales)?.checked_add(Scales::DQ8_FIXED_LEN as u64)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn midpoints_are_the_documented_float32_ties() {
        for (bits, code) in [
            (0xbeeb_8480, 2),
            (0xbd3a_7871, 6),
            (0x3d22_faff, 7),
            (0x3e50_67e0, 9),
            (0x3ec7_53f9, 11),
            (0x3f24_8daf_u32, 13),
        ] {
            assert_eq!(MIDPOINTS[code].to_bits(), bits, "midpoint above code {code}");
        }
        assert!(MIDPOINTS.windows(2).all(|w| w[0] < w[1]));
    }

    #[test]
    fn the_largest_unit_error_is_the_documented_one() {
        assert!((MAX_UNIT_ERROR - 0.151_903_6).abs() < 1e-7);
        assert!(CODEBOOK.windows(2).all(|w| (w[1] - w[0]) * 0.5 <= MAX_UNIT_ERROR));
    }

    #[test]
    fn lengths_do_not_overflow() {
        assert_eq!(codes_len(65, 64), Some(64));
        assert_eq!(codes_len(u64::MAX, 4096), Some(1 << 63));
        assert_eq!(scales_len(257, ScaleType::Dq8), Some(4 + 1024 + 8 + 257));
        assert_eq!(scales_len(u64::MAX, ScaleType::F32), None);
        assert_eq!(scales_len(u64::MAX, ScaleType::Dq8), None);
    }

    #[test]
    fn a_scales_payload_of_the_wrong_length_is_refused() {
        assert!(Scales::from_payload(&[0; 9], ScaleType::F32, 2).is_none());
        assert!(Scales::from_payload(&[0; 8], ScaleType::F32, 2).is_some());
        assert!(Scales::F32(&[0; 8]).get(2).is_nan());
    }
}
