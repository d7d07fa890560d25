//! Random tensors for kernel tests.

use half::{bf16, f16};

use crate::format::nf4::{self, Nf4Tensor, ScaleType, Scales};

/// A random tensor.
pub(crate) struct Sample {
    codes: Vec<u8>,
    scales: Vec<u8>,
    scale_type: ScaleType,
    block_size: u32,
    elements: u64,
}

impl Sample {
    /// A tensor with scales of all magnitudes. Many of them lie between two 16-bit floats.
    pub fn new(scale_type: ScaleType, elements: u64, block_size: u32) -> Self {
        let mut random = Random::default();
        let blocks = nf4::block_count(elements, block_size);
        let codes = (0..blocks * u64::from(block_size / 2)).map(|_| random.bits(8) as u8).collect();
        let mut scale = || random.scale();
        let scales = match scale_type {
            ScaleType::F32 => (0..blocks).flat_map(|_| scale().to_le_bytes()).collect(),
            ScaleType::Bf16 => (0..blocks).flat_map(|_| bf16::from_f32(scale()).to_le_bytes()).collect(),
            ScaleType::Dq8 => {
                // The first super-scale has the magnitude of map and offset, so that a fused
                // multiply-add shows. With the second one, half of the map gives scales between two
                // f16s or bf16s.
                let mut floats = vec![1.5];
                floats.extend((0..128).map(|_| random.tie_from_1_to_2() - 1.5));
                floats.extend((0..128).map(|_| random.significand()));
                let supers = blocks.div_ceil(nf4::SUPER_BLOCK as u64);
                floats.extend((0..supers).map(|i| if i % 2 == 0 { random.significand() } else { 1.0 }));
                let codes = (0..blocks).map(|_| random.bits(8) as u8);
                floats.into_iter().flat_map(f32::to_le_bytes).chain(codes).collect()
            }
        };
        Self { codes, scales, scale_type, block_size, elements }
    }

    /// A tensor with weights of similar magnitude.
    #[cfg(feature = "train")]
    pub fn even(scale_type: ScaleType, elements: u64, block_size: u32) -> Self {
        let mut random = Random::default();
        let blocks = nf4::block_count(elements, block_size);
        let codes = (0..blocks * u64::from(block_size / 2)).map(|_| random.bits(8) as u8).collect();
        // From 0.25 to 1.
        let mut scale = || 0.625 + 0.375 * random.uniform();
        let scales = match scale_type {
            ScaleType::F32 => (0..blocks).flat_map(|_| scale().to_le_bytes()).collect(),
            ScaleType::Bf16 => (0..blocks).flat_map(|_| bf16::from_f32(scale()).to_le_bytes()).collect(),
            ScaleType::Dq8 => {
                let floats = 1 + 256 + blocks.div_ceil(nf4::SUPER_BLOCK as u64);
                let floats: Vec<u8> = (0..floats).flat_map(|_| scale().to_le_bytes()).collect();
                floats.into_iter().chain((0..blocks).map(|_| random.bits(8) as u8)).collect()
            }
        };
        Self { codes, scales, scale_type, block_size, elements }
    }

    pub fn tensor(&self) -> Nf4Tensor<'_> {
        let blocks = nf4::block_count(self.elements, self.block_size) as usize;
        let scales = Scales::from_payload(&self.scales, self.scale_type, blocks).unwrap_or(Scales::F32(&[]));
        Nf4Tensor { codes: &self.codes, scales, block_size: self.block_size, elements: self.elements }
    }
}

/// A linear congruential generator. Only its high bits are used.
pub(crate) struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Self(0x9e37_79b9)
    }
}

impl Random {
    /// From -1 to 1.
    #[cfg(feature = "train")]
    pub fn uniform(&mut self) -> f32 {
        self.bits(24) as f32 / (1_u32 << 23) as f32 - 1.0
    }

    fn bits(&mut self, count: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> (64 - count)) as u32
    }

    /// Of either sign, from 1 to 2.
    fn significand(&mut self) -> f32 {
        f32::from_bits(self.bits(1) << 31 | 0x3f80_0000 | self.bits(23))
    }

    /// Halfway between two adjacent f16s or bf16s.
    fn tie_from_1_to_2(&mut self) -> f32 {
        let half = if self.bits(1) == 0 { self.bits(7) << 16 | 0x8000 } else { self.bits(10) << 13 | 0x1000 };
        f32::from_bits(0x3f80_0000 | half)
    }

    /// Of either sign, from below the smallest f16 to above the largest. Half of them lie halfway
    /// between two adjacent f16s or bf16s, to test the rounding of ties.
    fn scale(&mut self) -> f32 {
        let sign = self.bits(1) << 31;
        let exponent = (127 - 28 + self.bits(6) % 46) << 23;
        let random = f32::from_bits(sign | exponent | self.bits(23));
        match self.bits(2) {
            0 => f32::from_bits(random.to_bits() & 0xffff_0000 | 0x8000),
            1 => {
                let low = f16::from_f32(random).to_bits() & 0x7fff;
                // Between the largest f16 and infinity there is no midpoint.
                let low = low.min(0x7bfe);
                let tie = (f16::from_bits(low).to_f32() + f16::from_bits(low + 1).to_f32()) * 0.5;
                f32::from_bits(sign | tie.to_bits())
            }
            _ => random,
        }
    }
}
