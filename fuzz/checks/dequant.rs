//! Any codes and scales, of every type and block size: the decoder refuses the range, or gives what
//! the formula of the specification gives, bit for bit, on whatever instruction set it chooses.

use arbitrary::{Result, Unstructured};
use half::{bf16, f16};
use nf4pack::dequant::{dequantize, dequantize_bf16, dequantize_f16};
use nf4pack::format::nf4::{BLOCK_SIZES, CODEBOOK, Nf4Tensor, Scales};

/// Runs the check.
pub fn run(bytes: &[u8]) {
    let _ = decode(&mut Unstructured::new(bytes));
}

/// The sizes of a tensor and its bytes.
struct Tensor {
    block_size: u32,
    elements: u64,
    codes: Vec<u8>,
    scales: Table,
}

/// A table of scales: its parts, one after the other.
enum Table {
    F32(Vec<u8>),
    Bf16(Vec<u8>),
    Dq8 { offset: f32, map: Vec<u8>, super_scales: Vec<u8>, codes: Vec<u8> },
}

fn decode(u: &mut Unstructured<'_>) -> Result<()> {
    let tensor = tensor(u)?;
    let view = Nf4Tensor {
        codes: &tensor.codes,
        scales: match &tensor.scales {
            Table::F32(bytes) => Scales::F32(bytes),
            Table::Bf16(bytes) => Scales::Bf16(bytes),
            Table::Dq8 { offset, map, super_scales, codes } => Scales::Dq8 { offset: *offset, map, super_scales, codes },
        },
        block_size: tensor.block_size,
        elements: tensor.elements,
    };
    let first = if u.ratio(15, 16)? { u.int_in_range(0..=tensor.elements.min(1 << 20))? } else { u.arbitrary()? };
    let rest = tensor.elements.saturating_sub(first).min(1 << 14) as usize;
    // Mostly some blocks or registers: the reference takes longer than the decoder.
    let count = match u.int_in_range(0..=15)? {
        0..=11 => rest.min(u.int_in_range(0..=300)?),
        12 | 13 => rest,
        _ => u.int_in_range(0..=rest + 1)?,
    };
    let (mut full, mut brain, mut half) = (vec![7.0_f32; count], vec![bf16::ONE; count], vec![f16::ONE; count]);
    let results = [
        dequantize(&view, first, &mut full),
        dequantize_bf16(&view, first, &mut brain),
        dequantize_f16(&view, first, &mut half),
    ];
    assert!(results.iter().all(|result| result.is_ok() == results[0].is_ok()));
    if results[0].is_err() {
        assert!(full.iter().all(|&x| x == 7.0), "unchanged");
        return Ok(());
    }
    for (i, ((full, brain), half)) in full.iter().zip(&brain).zip(&half).enumerate() {
        let expected = tensor.value(first + i as u64);
        assert!(same(*full, expected), "element {i}: {full} for {expected}");
        assert!(same(brain.to_f32(), bf16::from_f32(expected).to_f32()), "element {i}: {brain} for {expected}");
        assert!(same(half.to_f32(), f16::from_f32(expected).to_f32()), "element {i}: {half} for {expected}");
    }
    Ok(())
}

/// Whether two numbers are the same, bit for bit; all NaNs count as one.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// A tensor whose lengths fit, mostly.
fn tensor(u: &mut Unstructured<'_>) -> Result<Tensor> {
    let block_size = if u.ratio(31, 32)? { *u.choose(&BLOCK_SIZES)? } else { u.arbitrary()? };
    let block = u64::from(block_size.clamp(1, 1 << 12));
    let more = if u.ratio(15, 16)? { 0 } else { 260 * block.min(32) };
    let elements = u.int_in_range(1..=3 * block)? + more;
    let blocks = elements.div_ceil(block);
    let wrong = u.ratio(1, 16)?;
    let length = |u: &mut Unstructured<'_>, len: u64| {
        Ok::<_, arbitrary::Error>(if wrong && u.ratio(1, 3)? {
            len.saturating_add_signed(u.arbitrary::<i8>()?.into())
        } else {
            len
        })
    };
    let code_bytes = length(u, blocks * block / 2)?;
    let codes = fill(u, code_bytes)?;
    let scales = match u.int_in_range(0..=2)? {
        0 => {
            let len = length(u, 4 * blocks)?;
            Table::F32(fill(u, len)?)
        }
        1 => {
            let len = length(u, 2 * blocks)?;
            Table::Bf16(fill(u, len)?)
        }
        _ => {
            let (map, super_scales, codes) = (length(u, 1024)?, length(u, 4 * blocks.div_ceil(256))?, length(u, blocks)?);
            Table::Dq8 {
                offset: u.arbitrary()?,
                map: fill(u, map)?,
                super_scales: fill(u, super_scales)?,
                codes: fill(u, codes)?,
            }
        }
    };
    let elements = if u.ratio(1, 64)? { u.arbitrary()? } else { elements };
    Ok(Tensor { block_size, elements, codes, scales })
}

/// A few bytes of the input, again and again: an odd number of them, so that neighbours differ.
fn fill(u: &mut Unstructured<'_>, len: u64) -> Result<Vec<u8>> {
    let seed: [u8; 13] = u.arbitrary()?;
    let len = len as usize;
    let mut bytes = seed.repeat(len.div_ceil(seed.len()));
    bytes.truncate(len);
    Ok(bytes)
}

impl Tensor {
    /// An element by section 7 of the specification.
    fn value(&self, element: u64) -> f32 {
        let code = self.codes[(element / 2) as usize] >> (4 * (element % 2)) & 15;
        CODEBOOK[usize::from(code)] * self.scales.get((element / u64::from(self.block_size)) as usize)
    }
}

impl Table {
    fn get(&self, block: usize) -> f32 {
        let float = |bytes: &[u8], i: usize| {
            f32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
        };
        match self {
            Self::F32(bytes) => float(bytes, block),
            Self::Bf16(bytes) => {
                f32::from_bits(u32::from(u16::from_le_bytes([bytes[2 * block], bytes[2 * block + 1]])) << 16)
            }
            Self::Dq8 { offset, map, super_scales, codes } => {
                float(map, usize::from(codes[block])) * float(super_scales, block / 256) + offset
            }
        }
    }
}
