//! Tests both kernels against the CPU, for every output, scale type and block size.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;

use half::{bf16, f16};
use nf4pack::dequant::copy_baseline::CopyKernel;
use nf4pack::dequant::{self, Codec, DequantError, Dequantizer, Fast, GpuWeights, Output, Setup};
use nf4pack::format::nf4::{self, Nf4Tensor, ScaleType, Scales};
use nf4pack::gpu::{BufferRange, Gpu};
use std::ops::Range;
use std::sync::OnceLock;

const SCALE_TYPES: [ScaleType; 3] = [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8];
const POISON: u8 = 0xa5;

/// A linear congruential generator.
struct Random(u64);

impl Random {
    fn bits(&mut self, count: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> (64 - count)) as u32
    }

    fn below(&mut self, end: u64) -> u64 {
        (u64::from(self.bits(32)) << 32 | u64::from(self.bits(32))) % end.max(1)
    }

    /// A float of either sign with a binary exponent in `exponents`.
    fn float(&mut self, exponents: Range<i32>) -> f32 {
        let exponent = exponents.start + self.below(exponents.len() as u64) as i32;
        f32::from_bits(self.bits(1) << 31 | ((127 + exponent) as u32) << 23 | self.bits(23))
    }

    /// A float halfway between two adjacent f16s or bf16s, so that code 15 (1.0) gives a tie.
    fn tie(&mut self) -> f32 {
        match self.bits(2) {
            0 => f32::from_bits(self.float(-60..60).to_bits() & 0xffff_0000 | 0x8000),
            1 => {
                // Subnormal f16s.
                let low = self.bits(10) as f32;
                if self.bits(1) == 0 { (low + 0.5) * 2.0_f32.powi(-24) } else { (low + 0.5) * -(2.0_f32.powi(-24)) }
            }
            _ => self.tie_from_1_to_2() * 2.0_f32.powi(self.bits(5) as i32 - 15),
        }
    }

    fn tie_from_1_to_2(&mut self) -> f32 {
        let half = if self.bits(1) == 0 { self.bits(7) << 16 | 0x8000 } else { self.bits(10) << 13 | 0x1000 };
        f32::from_bits(0x3f80_0000 | half)
    }

    /// A scale of any sign and magnitude without subnormal products. Many products are ties; some
    /// scales are zero.
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
        let words = nf4::codes_len(elements, block_size).unwrap() / 4;
        let codes = (0..words).flat_map(|_| random.bits(32).to_le_bytes()).collect();
        let scales = match scale_type {
            ScaleType::F32 => (0..blocks).flat_map(|_| random.scale().to_le_bytes()).collect(),
            ScaleType::Bf16 => (0..blocks).flat_map(|_| bf16::from_f32(random.scale()).to_le_bytes()).collect(),
            ScaleType::Dq8 => {
                let mut floats = match random.bits(2) {
                    // Scales halfway between two f16s or bf16s.
                    0 => vec![1.5],
                    1 => vec![0.0],
                    // Offset, map and super-scales of similar magnitude, so that a fused
                    // multiply-add shows.
                    _ => vec![random.float(-2..2)],
                };
                let ties = floats[0] == 1.5;
                floats.extend((0..256).map(|_| if ties { random.tie_from_1_to_2() - 1.5 } else { random.float(-2..2) }));
                floats.extend((0..blocks.div_ceil(256)).map(|_| if ties { 1.0 } else { random.float(-2..2) }));
                let floats = floats.into_iter().flat_map(f32::to_le_bytes);
                floats.chain((0..blocks).map(|_| random.bits(8) as u8)).collect()
            }
        };
        Self { codes, scales, scale_type, block_size, elements }
    }

    fn projection(&self) -> Nf4Tensor<'_> {
        let blocks = nf4::block_count(self.elements, self.block_size) as usize;
        let scales = Scales::from_payload(&self.scales, self.scale_type, blocks).unwrap();
        Nf4Tensor { codes: &self.codes, scales, block_size: self.block_size, elements: self.elements }
    }

    /// A range as decoded by the CPU, in little-endian bytes.
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

/// A device with both kernels, the fast one first.
struct Runner {
    gpu: Gpu,
    kernels: Vec<Dequantizer>,
}

/// The runner of the shared device. Each kernel is compiled and tested once.
fn shared_runner() -> Option<&'static Runner> {
    static RUNNER: OnceLock<Option<Runner>> = OnceLock::new();
    RUNNER.get_or_init(|| common::gpu().map(Runner::new)).as_ref()
}

impl Runner {
    fn new(gpu: Gpu) -> Self {
        Self::with(gpu, Setup::default())
    }

    fn with(gpu: Gpu, fast: Setup) -> Self {
        let plain = Setup { fast: Fast::Off, ..Setup::default() };
        let kernels = vec![Dequantizer::with(&gpu, fast).unwrap(), Dequantizer::with(&gpu, plain).unwrap()];
        Self { gpu, kernels }
    }

    /// Checks `range` in `outputs` with both kernels, each between poisoned bytes. All of them are
    /// submitted together if they fit in one buffer.
    fn check(&self, tensor: &Tensor, range: Range<u64>, outputs: &[Output]) {
        let weights = GpuWeights::upload(&self.gpu, &tensor.projection()).unwrap();
        let needed = |output: &Output| output.bytes(range.end - range.start).next_multiple_of(256) + 256;
        let bytes = 256 + self.kernels.len() as u64 * outputs.iter().map(needed).sum::<u64>();
        let pairs = outputs.iter().flat_map(|&output| self.kernels.iter().map(move |kernel| (kernel, output)));
        let pairs: Vec<_> = pairs.collect();
        let at_once = if bytes <= self.gpu.limits().max_buffer_size { pairs.len() } else { 1 };
        pairs.chunks(at_once).for_each(|pairs| self.check_together(tensor, &weights, &range, pairs));
    }

    fn check_together(&self, tensor: &Tensor, weights: &GpuWeights, range: &Range<u64>, all: &[(&Dequantizer, Output)]) {
        let mut places = Vec::new();
        let mut end = 256;
        for &(_, output) in all {
            let size = output.bytes(range.end - range.start);
            places.push(end..end + size);
            end = (end + size).next_multiple_of(256) + 256;
        }
        let whole = BufferRange::whole(self.gpu.storage_with("out", &vec![POISON; end as usize]).unwrap());
        let mut commands = self.gpu.commands("test");
        for ((dequantizer, output), place) in all.iter().zip(&places) {
            let out = whole.slice(place.start, place.end - place.start);
            dequantizer.record(&mut commands, weights, range.clone(), *output, &out).unwrap();
        }
        commands.submit().unwrap();
        let found = self.gpu.read(&whole).unwrap();
        let mut before = 0;
        for (&(_, output), place) in all.iter().zip(places) {
            let (start, end) = (place.start as usize, place.end as usize);
            let what = || {
                format!(
                    "{range:?} of {} elements, {:?}, block {}, to {output}",
                    tensor.elements, tensor.scale_type, tensor.block_size
                )
            };
            assert!(found[before..start].iter().all(|&b| b == POISON), "{}: written before it", what());
            let expected = tensor.reference(range, output);
            let floats = &found[start..start + expected.len()];
            if floats != expected {
                let size = output.element_bytes() as usize;
                let i = floats.chunks(size).zip(expected.chunks(size)).position(|(f, e)| f != e);
                panic!("{}: element {i:?} differs", what());
            }
            before = end;
        }
        assert!(found[before..].iter().all(|&b| b == POISON), "written behind the last output");
    }
}

#[test]
fn both_kernels_are_the_cpu_bit_for_bit() {
    let Some(runner) = shared_runner() else { return };
    assert!(runner.kernels[0].choices().iter().all(|c| c.fast), "{:?}", runner.kernels[0].choices());
    assert!(runner.kernels[1].choices().iter().all(|c| !c.fast && c.reason.is_some()));
    let mut random = Random(1);
    for scale_type in SCALE_TYPES {
        for block_size in nf4::BLOCK_SIZES {
            for elements in [1, 7, 8, 9, 31, 33, 63, 65, 4097, 20_011] {
                let tensor = Tensor::random(scale_type, block_size, elements, &mut random);
                runner.check(&tensor, 0..elements, &Output::ALL);
            }
        }
    }
}

#[test]
fn a_million_elements_and_ranges_of_them() {
    let Some(runner) = shared_runner() else { return };
    let mut random = Random(2);
    for (scale_type, block_size) in SCALE_TYPES.into_iter().zip([64, 32, 64]) {
        let elements = 1_000_003;
        let tensor = Tensor::random(scale_type, block_size, elements, &mut random);
        runner.check(&tensor, 0..elements, &Output::ALL);
        for _ in 0..8 {
            let start = random.below(elements) / 8 * 8;
            runner.check(&tensor, start..start + random.below((elements - start).min(30_000)), &Output::ALL);
        }
    }
}

#[test]
fn small_bindings_and_codes_in_parts() {
    let limits = |options: &mut nf4pack::gpu::Options| {
        options.max_binding = Some(10_000);
        options.max_buffer = Some(131_072);
    };
    let Some(gpu) = common::gpu_with(limits) else { return };
    let runner = Runner::new(gpu.clone());
    let mut random = Random(3);
    for (scale_type, block_size) in SCALE_TYPES.into_iter().zip([128, 32, 64]) {
        let elements = 700_001;
        let tensor = Tensor::random(scale_type, block_size, elements, &mut random);
        let weights = GpuWeights::upload(&gpu, &tensor.projection()).unwrap();
        assert_eq!(weights.codes.len(), 3);
        for middle in [262_144, 2 * 262_144] {
            let start = middle - random.below(10_000) / 8 * 8;
            runner.check(&tensor, start..middle + random.below(10_000), &Output::ALL);
        }
        // One buffer at a time.
        let found = runner.kernels[0].read(&weights, 8..elements, Output::F16).unwrap();
        assert!(found == tensor.reference(&(8..elements), Output::F16));
    }
}

#[test]
fn outputs_beyond_the_binding_limit() {
    let Some(gpu) = common::gpu_with(|options| options.max_binding = Some(1 << 20)) else { return };
    let runner = Runner::new(gpu);
    let mut random = Random(4);
    let tensor = Tensor::random(ScaleType::Dq8, 64, 1_500_007, &mut random);
    runner.check(&tensor, 16..1_500_007, &[Output::F32]);
}

#[test]
fn more_than_65535_workgroups() {
    let Some(gpu) = common::gpu() else { return };
    // Here both kernels decode 16 words per workgroup.
    let runner = Runner::with(gpu, Setup { workgroup: 4, ..Setup::default() });
    let elements = 65_536 * 16 * 8 + 3;
    let tensor = Tensor::random(ScaleType::Bf16, 64, elements, &mut Random(5));
    runner.check(&tensor, 0..elements, &[Output::Bf16]);
}

#[test]
fn every_workgroup_writes_the_same() {
    let Some(gpu) = common::gpu() else { return };
    let mut random = Random(6);
    for workgroup in [1, 100, 256] {
        let runner = Runner::with(gpu.clone(), Setup { workgroup, ..Setup::default() });
        for scale_type in SCALE_TYPES {
            let tensor = Tensor::random(scale_type, 32, 50_021, &mut random);
            runner.check(&tensor, 8..50_021, &Output::ALL);
        }
    }
}

/// A driver may keep a float32 below 2^-126 or flush it to zero of the same sign.
fn exact_or_flushed(found: u32, expected: u32, sign_bit: u32, smallest: u32) -> bool {
    let tiny = expected & (sign_bit - 1) <= smallest;
    found == expected || tiny && found == expected & sign_bit
}

#[test]
fn subnormal_products_are_exact_or_zero() {
    let Some(runner) = shared_runner() else { return };
    let gpu = &runner.gpu;
    let mut random = Random(7);
    let mut tensor = Tensor::random(ScaleType::F32, 32, 8192, &mut random);
    tensor.scales = (0..256).flat_map(|_| random.float(-127..-118).to_le_bytes()).collect();
    let weights = GpuWeights::upload(gpu, &tensor.projection()).unwrap();
    for dequantizer in &runner.kernels {
        let found = dequantizer.read(&weights, 0..8192, Output::F32).unwrap();
        let expected = tensor.reference(&(0..8192), Output::F32);
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let mut subnormals = [0, 0];
        for (found, expected) in found.chunks(4).zip(expected.chunks(4)).map(|(f, e)| (word(f), word(e))) {
            assert!(exact_or_flushed(found, expected, 1 << 31, 0x007f_ffff), "{found:#x} for {expected:#x}");
            let subnormal = matches!(expected & 0x7fff_ffff, 1..=0x7f_ffff);
            subnormals[usize::from(found == expected)] += usize::from(subnormal);
        }
        println!("{} subnormals flushed to zero, {} exact", subnormals[0], subnormals[1]);
        assert!(subnormals[0] + subnormals[1] > 1000, "the sample has too few subnormals");
        let found = dequantizer.read(&weights, 0..8192, Output::Bf16).unwrap();
        let expected = tensor.reference(&(0..8192), Output::Bf16);
        let half = |bytes: &[u8]| u32::from(u16::from_le_bytes(bytes.try_into().unwrap()));
        for (found, expected) in found.chunks(2).zip(expected.chunks(2)).map(|(f, e)| (half(f), half(e))) {
            // The largest float32 subnormals round to the smallest normal bf16.
            assert!(exact_or_flushed(found, expected, 1 << 15, 0x80), "{found:#x} for {expected:#x}");
        }
        let found = dequantizer.read(&weights, 0..8192, Output::F16).unwrap();
        for (i, (found, expected)) in found.chunks(2).zip(tensor.reference(&(0..8192), Output::F16).chunks(2)).enumerate() {
            assert_eq!(found, expected, "element {i}: all of these are zero in f16");
        }
    }
}

/// The fast shader with `from` replaced by `to`.
fn sabotaged(from: &str, to: &str) -> Setup {
    let source = concat!(
        include_str!("../../shaders/nf4_params.wgsl"),
        include_str!("../../shaders/nf4_bindings.wgsl"),
        include_str!("../../shaders/codec_nf4.wgsl"),
        include_str!("../../shaders/nf4_fast.wgsl")
    );
    assert!(source.contains(from));
    Setup { fast: Fast::Other(source.replace(from, to)), ..Setup::default() }
}

/// Whether the kernel for an output and a scale type is broken.
type Broken<'a> = &'a dyn Fn(Output, ScaleType) -> bool;

#[test]
fn a_broken_fast_kernel_is_replaced_by_the_plain_one() {
    let Some(gpu) = common::gpu() else { return };
    let all = |_: Output, _: ScaleType| true;
    let only = |which: Output| move |output: Output, _: ScaleType| output == which;
    // A product with a bf16 scale is never halfway between two bf16s.
    let ties = |output: Output, scale_type: ScaleType| output == Output::Bf16 && scale_type != ScaleType::Bf16;
    let dq8 = |_: Output, scale_type: ScaleType| scale_type == ScaleType::Dq8;
    let cases: [(&str, &str, Broken<'_>); 6] = [
        ("word & 15u]", "word & 7u]", &all),
        ("struct Params {", "struct Params [", &all),
        ("+ 0x7fffu + ((bits >> vec4(16u)) & vec4(1u))", "+ 0x8000u", &ties),
        ("pack2x16float(values.xy)", "pack2x16float(values.xy * 1.0003)", &only(Output::F16)),
        ("out[params.out_first + i] = bitcast", "out[params.out_first + i + 1u] = bitcast", &only(Output::F32)),
        ("return bitcast<f32>(bitcast<u32>(product) ^ params.zero) + head[0]", "return product", &dq8),
    ];
    let mut random = Random(8);
    for (from, to, broken) in cases {
        let dequantizer = Dequantizer::with(&gpu, sabotaged(from, to)).unwrap();
        let choices = dequantizer.choices();
        assert_eq!(choices.len(), 9);
        for choice in choices {
            assert_eq!(choice.fast, !broken(choice.output, choice.scale_type), "{to}: {choice:?}");
            assert_eq!(choice.fast, choice.reason.is_none());
            let tensor = Tensor::random(choice.scale_type, 64, 1003, &mut random);
            let weights = GpuWeights::upload(&gpu, &tensor.projection()).unwrap();
            let found = dequantizer.read(&weights, 0..1003, choice.output).unwrap();
            assert!(found == tensor.reference(&(0..1003), choice.output), "{to}: {choice:?}");
        }
    }
}

#[test]
fn what_cannot_be_dequantised_is_an_error() {
    let Some(gpu) = common::gpu() else { return };
    let dequantizer = Dequantizer::new(&gpu).unwrap();
    let tensor = Tensor::random(ScaleType::Dq8, 64, 1003, &mut Random(9));
    let weights = GpuWeights::upload(&gpu, &tensor.projection()).unwrap();
    assert!(dequantizer.read(&weights, 16..16, Output::F32).unwrap().is_empty());
    for range in [1..9, 0..1004, 1008..1008, Range { start: 16, end: 8 }] {
        let found = dequantizer.read(&weights, range.clone(), Output::F16);
        assert!(matches!(found, Err(DequantError::Range { .. })), "{range:?}: {found:?}");
    }
    let out = BufferRange::whole(gpu.storage("out", 4096).unwrap());
    for out in [out.slice(0, 2015), out.slice(16, 2016)] {
        let mut commands = gpu.commands("test");
        let found = dequantizer.record(&mut commands, &weights, 0..1003, Output::F16, &out);
        assert!(matches!(found, Err(DequantError::OutputRange { needed: 2016, .. })), "{found:?}");
    }
    let shorter = |range: &BufferRange| range.slice(0, range.size - 4);
    let parts = |sizes: &[u64]| sizes.iter().map(|&size| weights.codes[0].slice(0, size)).collect::<Vec<_>>();
    for bad in [
        GpuWeights { block_size: 48, ..weights.clone() },
        GpuWeights { elements: 2000, ..weights.clone() },
        GpuWeights { elements: u64::MAX, ..weights.clone() },
        GpuWeights { codec: Codec::Nf4(ScaleType::F32), ..weights.clone() },
        GpuWeights { scales: shorter(&weights.scales), ..weights.clone() },
        GpuWeights { scales: weights.scales.slice(4, weights.scales.size), ..weights.clone() },
        GpuWeights { codes: vec![shorter(&weights.codes[0])], ..weights.clone() },
        GpuWeights { codes: parts(&[256, 256]), ..weights.clone() },
        GpuWeights { codes: parts(&[0, 512]), ..weights.clone() },
        GpuWeights { codes: vec![], ..weights.clone() },
    ] {
        let found = dequantizer.read(&bad, 0..8, Output::F32);
        assert!(matches!(found, Err(DequantError::Weights { .. })), "{bad:?}: {found:?}");
    }
}

#[test]
fn the_copy_baseline_copies() {
    for max_binding in [None, Some(4096 + 16)] {
        let Some(gpu) = common::gpu_with(|options| options.max_binding = max_binding) else { return };
        let mut random = Random(10);
        for size in [16, 4096, 16 * 1024, 16 * 1024 + 4096, 200_016, 4, 8196, 200_012] {
            let bytes: Vec<u8> = (0..size).map(|_| random.bits(8) as u8).collect();
            let from = BufferRange::whole(gpu.storage_with("from", &bytes).unwrap());
            let to = BufferRange::whole(gpu.storage_with("to", &vec![POISON; size + 32]).unwrap());
            let to = to.slice(0, size as u64 + 32);
            let [from, target] = [&from, &to].map(|range| range.slice(0, size as u64));
            let copy = CopyKernel::new(&gpu).unwrap();
            let mut commands = gpu.commands("copy");
            copy.record(&mut commands, &from, &target).unwrap();
            assert!(copy.record(&mut commands, &from, &to).is_err());
            commands.submit().unwrap();
            let found = gpu.read(&to).unwrap();
            assert!(found[..size] == bytes, "{size} bytes");
            assert!(found[size..].iter().all(|&b| b == POISON), "{size} bytes: written outside");
        }
    }
}

#[test]
fn verdicts_are_kept_between_runs() {
    let folder = tempfile::tempdir().unwrap();
    let Some(gpu) = common::gpu_with(|options| options.cache = Some(folder.path().to_owned())) else { return };
    let records = || {
        let names = std::fs::read_dir(folder.path())
            .unwrap()
            .flat_map(|adapter| std::fs::read_dir(adapter.unwrap().path()).unwrap());
        let names = names.map(|file| file.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("self-test-")).collect::<Vec<_>>()
    };
    let fast = Dequantizer::new(&gpu).unwrap();
    let [name] = records().try_into().unwrap();
    // A planted verdict shows that the record is read and the test is not repeated.
    gpu.cache_record(&name, br#"[[0,"planted"]]"#);
    let recalled = Dequantizer::new(&gpu).unwrap().choices();
    assert_eq!(recalled[0].reason.as_deref(), Some("planted"));
    assert_eq!(recalled[1..], fast.choices()[1..]);
    // An invalid record repeats the test. Other kernels have their own record.
    gpu.cache_record(&name, b"{}");
    assert_eq!(Dequantizer::new(&gpu).unwrap().choices(), fast.choices());
    let broken = Dequantizer::with(&gpu, sabotaged("word & 15u]", "word & 7u]")).unwrap();
    assert!(broken.choices().iter().all(|c| !c.fast));
    assert_eq!(records().len(), 2);
}
