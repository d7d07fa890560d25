//! Sizes at and past the limits of operations: no rows, more rows than a buffer holds, and one
//! workgroup more than a dimension has.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use super::matmul::{Elements, Matmul, Weight};
use super::testing::{gpu, gpu_with, poisoned, random_mat};
use super::*;
use crate::arch::family::Activation;
use crate::format::FloatType;
use crate::gpu::{Commands, Options};

/// Everything that an operation needs, with `rows` tokens of 16 columns.
struct Inputs {
    /// A matrix [rows, 16].
    x: Mat,
    y: Mat,
    z: Mat,
    /// A matrix [rows, 4].
    narrow: Mat,
    /// [1, 16].
    row: Mat,
    /// [16, 16].
    square: Mat,
    words: BufferRange,
}

impl Inputs {
    /// With memory for `rows` rows, and matrices that claim `claimed` rows.
    fn new(gpu: &Gpu, rows: u32, claimed: u32) -> Self {
        let mat = |cols| Mat { rows: claimed, ..poisoned(gpu, rows, cols) };
        Self {
            x: mat(16),
            y: mat(16),
            z: mat(16),
            narrow: mat(4),
            row: random_mat(gpu, 1, 1, 16).0,
            square: random_mat(gpu, 2, 16, 16).0,
            words: BufferRange { buffer: gpu.storage("words", 64).unwrap(), offset: 0, size: 4 * u64::from(rows) },
        }
    }
}

type Record = fn(&Gpu, &mut Commands, &Inputs) -> Result<(), OpError>;

fn heads(of: &Inputs) -> AttentionShape {
    AttentionShape {
        first: 0,
        tokens: of.x.rows,
        heads: Heads { heads: 4, kv_heads: 4, head_dim: 4, scale: 1.0, window: None },
    }
}

/// Each operation over all rows.
const OPERATIONS: [(&str, Record); 18] = [
    ("scale", |gpu, c, of| Scale::new(gpu)?.record(c, 2.0, &of.x)),
    ("dropout", |gpu, c, of| {
        Dropout::new(gpu)?.record(c, 0.5, DropoutKey { seed: 1, step: 1, module: 1, window: 0 }, &of.x, &of.y, false)
    }),
    ("glu", |gpu, c, of| Glu::new(gpu, Activation::Silu)?.forward(c, &of.x, &of.y, &of.z)),
    ("glu, backward", |gpu, c, of| Glu::new(gpu, Activation::Silu)?.backward(c, &of.x, &of.y, &of.z)),
    ("norm", |gpu, c, of| RmsNorm::new(gpu)?.forward(c, &of.x, &of.row, 1.0, &of.y)),
    ("norm, backward", |gpu, c, of| RmsNorm::new(gpu)?.backward(c, &of.x, &of.row, 1.0, &of.y, &of.z, false)),
    ("rotary", |gpu, c, of| Rotary::new(gpu)?.forward(c, &of.x, 1, (0, &of.words), &of.square)),
    ("rotary from", |gpu, c, of| Rotary::new(gpu)?.forward_from(c, &of.x, 1, 0, &of.square)),
    ("attention", |gpu, c, of| {
        Attention::new(gpu, 4, None)?.forward(c, &heads(of), &of.x, &of.y, &of.y, &of.words, &of.z, &of.narrow)
    }),
    ("cached attention", |gpu, c, of| {
        let shape = CachedAttentionShape { tokens: of.x.rows, past: 0, heads: heads(of).heads };
        CachedAttention::new(gpu, 4, 1)?.forward(c, &shape, &of.x, &of.y, &of.y, &of.z)
    }),
    ("loss", |gpu, c, of| ChunkedLoss::new(gpu)?.accumulate(c, &of.x, 0, &of.words, &of.narrow)),
    ("exponentials", |gpu, c, of| ChunkedLoss::new(gpu)?.exponentials(c, &of.x, 0, &of.words, &of.narrow)),
    ("sums of the loss", |gpu, c, of| ChunkedLoss::new(gpu)?.rescale(c, &of.x, &of.words, &of.narrow)),
    ("gradient of the loss", |gpu, c, of| ChunkedLoss::new(gpu)?.gradient(c, [&of.x, &of.y], &of.words, &of.narrow, 1.0, 1)),
    ("embedding", |gpu, c, of| Gather::new(gpu)?.embed(c, &weight(of), &of.words, &of.x)),
    ("rows of labels", |gpu, c, of| Gather::new(gpu)?.rows_from(c, (&weight(of), 1), &of.words, &of.x)),
    ("product with a weight", |gpu, c, of| Matmul::new(gpu, None)?.forward(c, &of.x, &weight(of), None, false, &of.y)),
    ("product", |gpu, c, of| Matmul::new(gpu, None)?.nt(c, &of.x, &of.square, 1.0, false, &of.y)),
];

fn weight(of: &Inputs) -> Weight<'_> {
    let parts = std::slice::from_ref(&of.square.range);
    Weight::new(Elements::Raw { float_type: FloatType::F32, parts }, 16, 16)
}

#[test]
fn no_rows_are_no_work() {
    let Some(gpu) = gpu() else { return };
    let inputs = Inputs::new(&gpu, 0, 0);
    for (name, record) in OPERATIONS {
        let mut commands = gpu.commands("nothing");
        record(&gpu, &mut commands, &inputs).unwrap_or_else(|e| panic!("{name}: {e}"));
        commands.submit().unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    gpu.wait().unwrap();
}

#[test]
fn rows_that_a_buffer_does_not_have_are_refused() {
    let Some(gpu) = gpu() else { return };
    for claimed in [4, 1 << 28, 1 << 30, u32::MAX] {
        let inputs = Inputs::new(&gpu, 3, claimed);
        for (name, record) in OPERATIONS {
            match record(&gpu, &mut gpu.commands("past the end"), &inputs) {
                Err(OpError::Shape { .. }) => {}
                other => panic!("{name} with {claimed} rows: {other:?}"),
            }
        }
    }
    let refused = Mat::new(&gpu, "all", u32::MAX, u32::MAX);
    assert!(matches!(refused, Err(GpuError::TooLarge { limit_name: "maxBufferSize", .. })), "{refused:?}");
}

/// A block of queries is a workgroup of the second dimension, which is not cut.
#[test]
fn one_block_of_queries_more_than_a_dimension_has() {
    let Some(gpu) = gpu_with(|options: &mut Options| options.max_groups = Some(4)) else { return };
    for (rows, fits) in [(256, true), (257, false)] {
        let mut inputs = Inputs::new(&gpu, rows, rows);
        let starts = vec![0_u32; rows as usize];
        inputs.words = BufferRange::whole(gpu.storage_with("starts", bytemuck::cast_slice(&starts)).unwrap());
        let mut commands = gpu.commands("attention");
        Attention::new(&gpu, 4, None)
            .unwrap()
            .forward(
                &mut commands,
                &heads(&inputs),
                &inputs.x,
                &inputs.y,
                &inputs.y,
                &inputs.words,
                &inputs.z,
                &inputs.narrow,
            )
            .unwrap();
        match commands.submit() {
            Ok(_) if fits => gpu.wait().unwrap(),
            Err(GpuError::KernelLimit { needed: 5, limit: 4, limit_name, .. }) if !fits => {
                assert_eq!(limit_name, "maxComputeWorkgroupsPerDimension");
            }
            other => panic!("{rows} rows: {other:?}"),
        }
    }
}
