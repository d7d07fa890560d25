//! The memory of the operands of products on matrix units.

use std::sync::{Mutex, PoisonError};

use crate::gpu::{BufferRange, Gpu, GpuError};
use crate::ops::OpError;
use crate::ops::matmul::panels::{PADDING, Size};

/// With fewer rows, the memory traffic of the weights dominates, and kernels that decode them on
/// the fly are faster.
pub const MIN_ROWS: u32 = 65;
/// Maximum elements of a decoded weight, unless 128 rows have more. Larger weights are decoded and
/// multiplied in parts.
const DECODED_ELEMENTS: u64 = 1 << 26;

/// Where a packed operand is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The left operand of products with weights: inputs, or gradients of outputs.
    Left,
    /// The inputs, while gradients of outputs are the left operand.
    Inputs,
}

/// Memory that grows to the largest size asked for.
#[derive(Debug)]
pub struct Scratch {
    label: &'static str,
    range: Mutex<Option<BufferRange>>,
}

/// The memory of each operand, and the exponents of the packed ones.
#[derive(Debug)]
pub struct Memory {
    pub(super) packed: [Scratch; 2],
    pub(super) exponents: [Scratch; 2],
    pub(super) right: Scratch,
    pub(super) low: Scratch,
    pub(super) other: Scratch,
}

/// Rows of a weight [outputs, inputs] that are decoded at once.
pub fn rows_at_once(inputs: u32) -> u32 {
    let rows = DECODED_ELEMENTS / u64::from(inputs.max(1)).next_multiple_of(PADDING.into());
    (rows / u64::from(PADDING)).max(1) as u32 * PADDING
}

impl Scratch {
    fn new(label: &'static str) -> Self {
        Self { label, range: Mutex::default() }
    }

    pub(super) fn get(&self, gpu: &Gpu, bytes: u64) -> Result<BufferRange, GpuError> {
        let mut range = self.range.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(range) = range.as_ref().filter(|range| range.size >= bytes) {
            return Ok(range.slice(0, bytes));
        }
        // What was recorded before keeps its memory.
        let larger = BufferRange::whole(gpu.storage(self.label, bytes)?);
        Ok(range.insert(larger).slice(0, bytes))
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            packed: ["left panels", "input panels"].map(Scratch::new),
            exponents: ["exponents", "exponents of inputs"].map(Scratch::new),
            right: Scratch::new("right panels"),
            low: Scratch::new("low rank panels"),
            other: Scratch::new("adapter panels"),
        }
    }
}

impl Memory {
    /// Bytes of the operands, for packed operands of at most `rows` rows, weights of these shapes
    /// [outputs, inputs] and adapters of `rank` with their gradients. Rank 0: no adapter.
    pub fn bytes(rows: u32, weights: &[(u32, u32)], rank: u32) -> u64 {
        Self::of_operands(rows, weights, rank).into_iter().fold(0, u64::saturating_add)
    }

    /// Reserves [`Memory::bytes`].
    pub fn reserve(&self, gpu: &Gpu, rows: u32, weights: &[(u32, u32)], rank: u32) -> Result<(), OpError> {
        let limit = gpu.limits().max_storage_buffer_binding_size;
        let [left, inputs] = &self.packed;
        let [left_exponents, input_exponents] = &self.exponents;
        let scratch = [left, inputs, left_exponents, input_exponents, &self.right, &self.low, &self.other];
        for (scratch, bytes) in scratch.into_iter().zip(Self::of_operands(rows, weights, rank)) {
            // A larger operand is not packed.
            if bytes > 0 && bytes <= limit {
                scratch.get(gpu, bytes)?;
            }
        }
        Ok(())
    }

    /// Bytes of the largest operand of each kind, in the order of [`Memory::reserve`].
    fn of_operands(rows: u32, weights: &[(u32, u32)], rank: u32) -> [u64; 7] {
        if rows < MIN_ROWS {
            return [0; 7];
        }
        let largest = |bytes: &dyn Fn(u32, u32) -> u64| {
            weights.iter().map(|&(outputs, inputs)| bytes(outputs, inputs)).max().unwrap_or_default()
        };
        let left = largest(&|outputs, inputs| Size { rows, cols: outputs.max(inputs) }.bytes());
        let right = largest(&|outputs, inputs| Size { rows: outputs.min(rows_at_once(inputs)), cols: inputs }.bytes());
        let exponents = Size { rows, cols: 0 }.exponent_bytes();
        if rank == 0 {
            return [left, 0, exponents, 0, right, 0, 0];
        }
        let inputs = largest(&|_, inputs| Size { rows, cols: inputs }.bytes());
        let other = largest(&|outputs, inputs| Size { rows: outputs.max(inputs), cols: rank }.bytes());
        // A side of an adapter that is the right operand of a product of its own.
        let right = right.max(other).max(largest(&|outputs, inputs| Size { rows: rank, cols: outputs.max(inputs) }.bytes()));
        let low = Size { rows, cols: rank }.bytes();
        [left, inputs, exponents, exponents, right.max(low), low, other]
    }
}
