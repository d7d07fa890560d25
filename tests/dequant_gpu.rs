//! Both kernels against the CPU, in every output, scale type and block size.
#![cfg(feature = "gpu")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "common/gpu.rs"]
mod common;

use half::{bf16, f16};
use nf4pack::dequant::{self, Dequantizer, GpuWeights, Output, Setup};
use nf4pack::format::nf4::{self, Projection, ScaleType, Scales};
use nf4pack::gpu::{BufferRange, Gpu};
use std::ops::Range;

const SCALE_TYPES: [ScaleType; 3] = [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8];
const POISON: u8 = 0xa5;

/// A linear congruential generator.
struct Random(u64);

impl Random {
    fn bits(&mut self, count: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 32) as u32) >> (32 - count)
    }

    fn below(&mut self, end: u64) -> u64 {
        (u64::from(self.bits(32)) << 32 | u64::from(self.bits(32))) % end.max(1)
    }

    /// A float of either sign with an exponent in `exponents` (of two).
    fn float(&mut self, exponents: Range<i32>) -> f32 {
        let exponent = exponents.start + self.below(exponents.len() as u64) as i32;
        f32::from_bits(self.bits(1) << 31 | ((127 + exponent) as u32) << 23 | self.bits(23))
    }

    /// A float half way between two neighbouring f16s or bf16s, so that code 15 (1.0) ties.
    fn tie(&mut self) -> f32 {
        if self.bits(1) == 0 {
            let low = self.bits(15) as u16 % 0x7bff;
            let tie = (f16::from_bits(low).to_f32() + f16::from_bits(low + 1).to_f32()) * 0.5;
            if self.bits(1) == 0 { tie } else { -tie }
        } else {
            f32::from_bits(self.float(-60..60).to_bits() & 0xffff_0000 | 0x8000)
        }
    }

    /// A scale of any sign and size whose products are no subnormals, many of them ties; some are zero.
    fn scale(&mut self) -> f32 {
        match self.bits(3) {
            0 => [0.0, -0.0, 65504.0, 65519.99, 65520.0, 65536.0, 5.960_464_5e-8, 2.980_232_2e-8][self.bits(3) as usize],
            1..=3 => self.tie(),
            4 => self.float(-110..127),
            5 => self.float(-27..-12),
            _ => self.float(-8..2),
        }
    }
}

/// A random tensor.
struct Tensor {
    codes: Vec<u8>,
    scales: Vec<u8>,
    scale_type: ScaleType,
    block_size: u32,
    elements: u64,
}

impl Tensor {
    fn random(scale_type: ScaleType, block_size: u32, elements: u64, random: &mut Random) -> Self {
        let blocks = nf4::block_count(elements, block_size);
        let codes = (0..nf4::codes_len(elements, block_size).unwrap()).map(|_| random.bits(8) as u8).collect();
        let scales = match scale_type {
            ScaleType::F32 => (0..blocks).flat_map(|_| random.scale().to_le_bytes()).collect(),
            ScaleType::Bf16 => (0..blocks).flat_map(|_| bf16::from_f32(random.scale()).to_le_bytes()).collect(),
            ScaleType::Dq8 => {
                // Offset, map and super-scales of similar size, so that a fused multiply-add shows; now and then no offset.
                let offset = if random.bits(2) == 0 { 0.0 } else { random.float(-2..2) };
                let floats = (0..256 + blocks.div_ceil(256)).map(|_| random.float(-2..2));
                let floats: Vec<u8> = [offset].into_iter().chain(floats).flat_map(f32::to_le_bytes).collect();
                floats.into_iter().chain((0..blocks).map(|_| random.bits(8) as u8)).collect()
            }
        };
        Self { codes, scales, scale_type, block_size, elements }
    }

    fn projection(&self) -> Projection<'_> {
        let blocks = nf4::block_count(self.elements, self.block_size) as usize;
        let scales = Scales::from_payload(&self.scales, self.scale_type, blocks).unwrap();
        Projection { codes: &self.codes, scales, block_size: self.block_size, elements: self.elements }
    }

    /// What the CPU makes of a range: little-endian bytes.
    fn reference(&self, range: &Range<u64>, output: Output) -> Vec<u8> {
        let (projection, len) = (self.projection(), (range.end - range.start) as usize);
        match output {
            Output::F32 => {
                let mut out = vec![0.0; len];
                dequant::dequantize(&projection, range.start, &mut out).unwrap();
                out.into_iter().flat_map(f32::to_le_bytes).collect()
            }
            Output::F16 => {
                let mut out = vec![f16::ZERO; len];
                dequant::dequantize_f16(&projection, range.start, &mut out).unwrap();
                out.into_iter().flat_map(f16::to_le_bytes).collect()
            }
            Output::Bf16 => {
                let mut out = vec![bf16::ZERO; len];
                dequant::dequantize_bf16(&projection, range.start, &mut out).unwrap();
                out.into_iter().flat_map(bf16::to_le_bytes).collect()
            }
        }
    }
}

/// A device with both kernels: the fast one first.
struct Runner {
    gpu: Gpu,
    kernels: Vec<Dequantizer>,
}

impl Runner {
    fn new(gpu: Gpu) -> Self {
        let plain = Setup { fast: None, ..Setup::default() };
        let kernels = vec![Dequantizer::new(&gpu).unwrap(), Dequantizer::with(&gpu, plain).unwrap()];
        Self { gpu, kernels }
    }

    /// The one runner: `range` in `outputs` by both kernels, into the middle of a poisoned buffer.
    fn check(&self, tensor: &Tensor, range: Range<u64>, outputs: &[Output]) {
        let weights = GpuWeights::upload(&self.gpu, &tensor.projection()).unwrap();
        for &output in outputs {
            let needed = output.bytes(range.end - range.start);
            let expected = tensor.reference(&range, output);
            for dequantizer in &self.kernels {
                let poison = vec![POISON; needed as usize + 256 + 64];
                let whole = BufferRange::whole(self.gpu.storage_with("out", &poison).unwrap());
                let mut commands = self.gpu.commands("test");
                dequantizer.record(&mut commands, &weights, range.clone(), output, &whole.slice(256, needed)).unwrap();
                commands.submit().unwrap();
                let found = self.gpu.read(&whole).unwrap();
                let (before, rest) = found.split_at(256);
                let (floats, after) = rest.split_at(needed as usize);
                let what = format!(
                    "{range:?} of {} elements, {:?}, block {}, to {output}",
                    tensor.elements, tensor.scale_type, tensor.block_size
                );
                assert!(before.iter().chain(&after[..64]).all(|&b| b == POISON), "{what}: written outside");
                let size = output.element_bytes() as usize;
                for (i, (found, expected)) in floats.chunks(size).zip(expected.chunks(size)).enumerate() {
                    assert_eq!(found, expected, "{what}: element {i}");
                }
            }
        }
    }
}

#[test]
fn both_kernels_are_the_cpu_bit_for_bit() {
    let Some(gpu) = common::gpu() else { return };
    let runner = Runner::new(gpu);
    assert!(runner.kernels[0].choices().iter().all(|c| c.fast), "{:?}", runner.kernels[0].choices());
    assert!(runner.kernels[1].choices().iter().all(|c| !c.fast && c.reason.is_some()));
    let mut random = Random(1);
    for scale_type in SCALE_TYPES {
        for block_size in [32, 64, 256, 4096] {
            for elements in [1, 7, 8, 9, 31, 33, 63, 65, 4097, 20_011] {
                let tensor = Tensor::random(scale_type, block_size, elements, &mut random);
                runner.check(&tensor, 0..elements, &Output::ALL);
            }
        }
    }
}
