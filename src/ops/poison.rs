//! Runs every kernel over poisoned memory. Sizes are odd: no multiple of a tile, a workgroup or a
//! vector.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use super::matmul::{Adapter, Elements, Join, Largest, Matmul, PackedGlu, PackedHalves, PackedNorm, Place, Weight, Wide};
use super::testing::{gpu, mat, poisoned, random, random_mat, units};
use super::*;
use crate::arch::family::Activation;
use crate::dequant::Codec;
use crate::dequant::copy_baseline::CopyKernel;
use crate::dequant::{Dequantizer, Fast, GpuWeights, Output, Setup};
use crate::format::FloatType;
use crate::format::nf4::ScaleType;
use crate::gpu::Commands;
use crate::gpu::poison::assert_written;
use crate::ops::trial::stored;

const SCALES: [ScaleType; 3] = [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8];
const TYPES: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

fn ranges<const N: usize>(mats: [&Mat; N]) -> [&BufferRange; N] {
    mats.map(|mat| &mat.range)
}

fn words(gpu: &Gpu, words: &[u32]) -> BufferRange {
    BufferRange::whole(gpu.storage_with("words", bytemuck::cast_slice(words)).unwrap())
}

fn quantized(gpu: &Gpu, scale_type: ScaleType, elements: u32) -> GpuWeights {
    Codec::Nf4(scale_type).sample(gpu, elements.into()).unwrap().0
}

fn raw(gpu: &Gpu, float_type: FloatType, elements: u32) -> [BufferRange; 1] {
    let (bytes, _) = stored(float_type, &random(5, elements as usize));
    let buffer = gpu.storage_with("raw", &bytes).unwrap();
    [BufferRange { buffer, offset: 0, size: bytes.len() as u64 }]
}

#[test]
fn decoders() {
    let Some(gpu) = gpu() else { return };
    let fast = Dequantizer::with(&gpu, Setup::default()).unwrap();
    let plain = Dequantizer::with(&gpu, Setup { fast: Fast::Off, ..Setup::default() }).unwrap();
    assert!(fast.choices().iter().all(|choice| choice.fast), "{:?}", fast.choices());
    for scale_type in SCALES {
        // Ends inside a word of codes, whose other elements are padding of the output.
        let elements = 9001;
        let weights = quantized(&gpu, scale_type, elements as u32);
        let out = |output: Output| {
            mat(&gpu, 1, (output.bytes(elements) / 4) as u32, &vec![0.0; output.bytes(elements) as usize / 4])
        };
        let outs = [&fast, &plain].map(|kernels| Output::ALL.map(|output| (kernels, output, out(output))));
        let results: Vec<&BufferRange> = outs.iter().flatten().map(|(_, _, out)| &out.range).collect();
        assert_written(&gpu, &["nf4_fast:to_16", "nf4_fast:to_f32", "nf4_plain:main"], &results, &[], |commands| {
            for (kernels, output, out) in outs.iter().flatten() {
                kernels.record(commands, &weights, 0..elements, *output, &out.range).unwrap();
            }
        });
    }
}

#[test]
fn copies() {
    let Some(gpu) = gpu() else { return };
    let copy = CopyKernel::new(&gpu).unwrap();
    let [by_vectors, by_words] = [4 * 1003, 4003].map(|count| (random_mat(&gpu, 1, 1, count).0, poisoned(&gpu, 1, count)));
    let results = ranges([&by_vectors.1, &by_words.1]);
    assert_written(&gpu, &["copy:vectors", "copy:words"], &results, &[], |commands| {
        for (from, to) in [&by_vectors, &by_words] {
            copy.record(commands, &from.range, &to.range).unwrap();
        }
    });
}

/// Tiles, chunks of the sums, and few rows; with a bias, and added to a result.
#[test]
fn products() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(&gpu, None).unwrap();
    let (outputs, inputs) = (37, 523);
    let (dense, _) = random_mat(&gpu, 9, outputs, inputs);
    for (i, scale_type) in SCALES.into_iter().enumerate() {
        let nf4 = quantized(&gpu, scale_type, outputs * inputs);
        let parts = raw(&gpu, TYPES[i], outputs * inputs);
        let weights = [Elements::Quantized(&nf4), Elements::Raw { float_type: TYPES[i], parts: &parts }]
            .map(|e| Weight::new(e, outputs, inputs));
        let (bias, _) = random_mat(&gpu, 3, 1, outputs);
        for m in [3, 19] {
            let ((x, _), (dy, _)) = (random_mat(&gpu, 1, m, inputs), random_mat(&gpu, 2, m, outputs));
            let ys = [0, 1].map(|_| poisoned(&gpu, m, outputs));
            let dxs = [0, 1].map(|_| poisoned(&gpu, m, inputs));
            let (added, _) = random_mat(&gpu, 4, m, outputs);
            let (gram, product) = (poisoned(&gpu, outputs, inputs), poisoned(&gpu, m, inputs));
            let results = ranges([&ys[0], &ys[1], &dxs[0], &dxs[1], &gram, &product]);
            let record = |commands: &mut Commands| {
                for ((weight, y), dx) in weights.iter().zip(&ys).zip(&dxs) {
                    matmul.forward(commands, &x, weight, Some(&bias), false, y).unwrap();
                    matmul.backward(commands, &dy, weight, false, dx).unwrap();
                }
                matmul.nt(commands, &x, &dense, 0.5, true, &added).unwrap();
                matmul.tn(commands, &dy, &x, 2.0, false, &gram).unwrap();
                matmul.nn(commands, &dy, &dense, 1.0, false, &product).unwrap();
            };
            if m == 3 {
                let kernels =
                    ["matmul_quantized:main", "matmul_raw:main", "matmul_rows_quantized:main", "matmul_rows_raw:main"];
                assert_written(&gpu, &kernels, &results, &ranges([&added]), record);
            } else {
                let kernels = ["matmul_quantized:main", "matmul_raw:main", "matmul_sum:main"];
                assert_written(&gpu, &kernels, &results, &ranges([&added]), record);
            }
        }
    }
}

/// Ragged edges; chunks of the sums.
#[test]
fn products_on_matrix_units() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(&gpu, Some(units(&gpu))).unwrap();
    for ((outputs, inputs), (scale_type, float_type)) in
        [(37, 71), (30, 1100)].into_iter().zip(SCALES.into_iter().zip(TYPES))
    {
        let nf4 = quantized(&gpu, scale_type, outputs * inputs);
        let parts = raw(&gpu, float_type, outputs * inputs);
        let weights = [Elements::Quantized(&nf4), Elements::Raw { float_type, parts: &parts }]
            .map(|e| Weight::new(e, outputs, inputs));
        let ((x, _), y) = (random_mat(&gpu, 1, 69, inputs), [0, 1].map(|_| poisoned(&gpu, 69, outputs)));
        let record = |commands: &mut Commands| {
            for (weight, y) in weights.iter().zip(&y) {
                matmul.forward(commands, &x, weight, None, false, y).unwrap();
            }
        };
        let products =
            ["pack:main", "panels_quantized:decode", "panels_quantized:extent", "panels_raw:decode", "panels_raw:extent"];
        let first = if inputs > 1000 { vec!["matmul_panels:main", "matmul_sum:main"] } else { vec!["matmul_panels:main"] };
        assert_written(&gpu, &[first, products.to_vec()].concat(), &ranges([&y[0], &y[1]]), &[], record);
    }
}

/// A weight that was measured, with an adapter and its gradients.
#[test]
fn adapters_on_matrix_units() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(&gpu, Some(units(&gpu))).unwrap();
    let (rows, outputs, inputs, rank) = (69, 36, 71, 5);
    let nf4 = quantized(&gpu, SCALES[0], outputs * inputs);
    let largest = Largest { range: poisoned(&gpu, 1, 4).range, at: 2 };
    let weight = Weight::new(Elements::Quantized(&nf4), outputs, inputs).measured(largest.clone());
    let ((x, _), (dy, _)) = (random_mat(&gpu, 1, rows, inputs), random_mat(&gpu, 2, rows, outputs));
    let ((a, _), (b, _)) = (random_mat(&gpu, 3, rank, inputs), random_mat(&gpu, 4, outputs, rank));
    let [u, du] = [0; 2].map(|_| poisoned(&gpu, rows, rank));
    let (y, dx, da, db) = (
        poisoned(&gpu, rows, outputs),
        poisoned(&gpu, rows, inputs),
        poisoned(&gpu, rank, inputs),
        poisoned(&gpu, outputs, rank),
    );
    let kernels = [
        "align:align",
        "align:extent",
        "low_rank:main",
        "matmul_panels:main",
        "matmul_sum:main",
        "pack:main",
        "panels_measure:main",
        "panels_quantized:decode",
        "panels_quantized:extent",
        "panels_raw:decode",
        "panels_raw:extent",
    ];
    assert_written(&gpu, &kernels, &ranges([&u, &du, &y, &dx, &da, &db]), &[], |commands| {
        commands.clear(&largest.range);
        matmul.measure(commands, &weight, &largest).unwrap();
        let packed = &matmul.pack(commands, &x).unwrap();
        let low = &matmul.low_nt(commands, packed, &a, &u).unwrap();
        let adapter = Adapter { low, other: &b, scale: 2.0 };
        matmul.forward_adapted(commands, packed, &weight, None, adapter, false, &y).unwrap();
        let (packed, inputs) = (&matmul.pack(commands, &dy).unwrap(), &matmul.pack_to(commands, &x, Place::Inputs).unwrap());
        let low = &matmul.low_nn(commands, packed, &b, 2.0, &du).unwrap();
        matmul.tn(commands, packed, &u, 2.0, false, &db).unwrap();
        matmul.tn(commands, &du, inputs, 1.0, false, &da).unwrap();
        let adapter = Adapter { low, other: &a, scale: 2.0 };
        matmul.backward_adapted(commands, packed, &weight, adapter, false, &dx).unwrap();
    });
}

#[test]
fn halves() {
    let Some(gpu) = gpu() else { return };
    let halves = Halves::new(&gpu).unwrap();
    for cols in [301, 304] {
        let [(rounded, _), (kept, _), (both, _)] = [1, 2, 3].map(|seed| random_mat(&gpu, seed, 7, cols));
        let [stored, of_both] = [(); 2].map(|()| poisoned(&gpu, 7, Halves::words(cols)));
        let loaded = poisoned(&gpu, 7, cols);
        let kernels = ["halves:keep", "halves:keep_rounded", "halves:load", "halves:round_rows"];
        let results = ranges([&stored, &of_both, &loaded]);
        assert_written(&gpu, &kernels, &results, &ranges([&rounded, &kept, &both]), |commands| {
            halves.keep_rounded(commands, &both, &of_both).unwrap();
            halves.round(commands, &rounded).unwrap();
            halves.keep(commands, &kept, &stored).unwrap();
            halves.load(commands, &stored, &loaded).unwrap();
        });
    }
}

#[test]
fn gated_activations_in_halves() {
    let Some(gpu) = gpu() else { return };
    let (halves, glu) = (Halves::new(&gpu).unwrap(), Glu::new(&gpu, Activation::Silu).unwrap());
    let both = StoredGlu::new(&gpu, Activation::Silu, &halves, &glu).unwrap();
    let (rows, cols) = (7, 312);
    let [(gate, _), (up, _), (dh, _)] = [1, 2, 3].map(|seed| random_mat(&gpu, seed, rows, cols));
    let stored = [(); 2].map(|()| poisoned(&gpu, rows, Halves::words(cols)));
    let [h, again, d_gate, d_up, unused, unused_too] = [(); 6].map(|()| poisoned(&gpu, rows, cols));
    let kernels = ["glu_halves:backward_stored", "glu_halves:forward_keep", "glu_halves:forward_stored"];
    let results = ranges([&stored[0], &stored[1], &h, &again, &d_gate, &d_up]);
    assert_written(&gpu, &kernels, &results, &ranges([&gate, &up, &dh]), |commands| {
        both.forward(commands, [&gate, &up], stored.each_ref(), &h).unwrap();
        both.again(commands, stored.each_ref(), [&unused, &unused_too], &again).unwrap();
        both.backward(commands, stored.each_ref(), &dh, [&d_gate, &d_up]).unwrap();
    });
}

/// Ragged tiles, of operands in places and in the memory of matrices.
#[test]
fn packed_norms_and_gated_activations() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(&gpu, Some(units(&gpu))).unwrap();
    let norm = PackedNorm::new(&gpu).unwrap();
    for cols in [100, 300] {
        let ((x, _), (gamma, _), y) =
            (random_mat(&gpu, 1, 69, cols), random_mat(&gpu, 2, 1, cols), poisoned(&gpu, 69, cols));
        let record = |commands: &mut Commands| {
            norm.forward(commands, &matmul, &x, &gamma, 1e-5, &y, Place::Left).unwrap().unwrap().memory().unwrap()
        };
        let memory = record(&mut gpu.commands("ranges"));
        let results = [&memory.elements, &memory.exponents, &y.range.slice(0, 4 * 69)];
        assert_written(&gpu, &["norm_panels:measure", "norm_panels:write"], &results, &[], |commands| {
            drop(record(commands))
        });
    }
    let glu = PackedGlu::new(&gpu, Activation::Silu).unwrap();
    let (rows, cols) = (251, 1000);
    let [(gate, _), (up, _), (dh, _)] = [1, 2, 3].map(|seed| random_mat(&gpu, seed, rows, cols));
    let stored = [(); 2].map(|()| poisoned(&gpu, rows, Halves::words(cols)));
    let [d_gate, d_up] = [(); 2].map(|()| poisoned(&gpu, rows, cols));
    let record = |commands: &mut Commands| {
        let h = glu.forward(commands, &matmul, [&gate, &up], stored.each_ref(), &dh).unwrap().unwrap();
        let again = glu.again(commands, &matmul, stored.each_ref(), &dh).unwrap().unwrap();
        let both = glu.backward(commands, &matmul, stored.each_ref(), &dh, [&d_gate, &d_up]).unwrap().unwrap();
        [&h, &again, &both[0], &both[1]].map(|packed| packed.memory().unwrap())
    };
    let written = record(&mut gpu.commands("ranges"));
    let ranges = written.iter().flat_map(|memory| [&memory.elements, &memory.exponents]);
    let results: Vec<&BufferRange> = ranges.chain(stored.iter().map(|mat| &mat.range)).collect();
    let kernels = [
        "glu_panels:again",
        "glu_panels:gradients",
        "glu_panels:keep",
        "glu_panels:measure",
        "glu_panels:measure_gradients",
    ];
    assert_written(&gpu, &kernels, &results, &[], |commands| drop(record(commands)));
    let packed = PackedHalves::new(&gpu).unwrap();
    let record = |commands: &mut Commands| {
        packed.pack(commands, &matmul, &stored[0], &gate, Place::Left).unwrap().unwrap().memory().unwrap()
    };
    let memory = record(&mut gpu.commands("ranges"));
    assert_written(&gpu, &["halves_panels:main"], &[&memory.elements, &memory.exponents], &[], |commands| {
        drop(record(commands))
    });
}

/// Tokens at and past the end of the vocabulary.
#[test]
fn gathers() {
    let Some(gpu) = gpu() else { return };
    let (vocab, cols) = (29, 37);
    let ids = [vocab - 1, vocab, 0, u32::MAX, vocab - 1, 7, u32::MAX - 1];
    let ids_range = words(&gpu, &ids);
    let gather = Gather::new(&gpu).unwrap();
    for (scale_type, float_type) in SCALES.into_iter().zip(TYPES) {
        let nf4 = quantized(&gpu, scale_type, vocab * cols);
        let parts = raw(&gpu, float_type, vocab * cols);
        let tables =
            [Elements::Quantized(&nf4), Elements::Raw { float_type, parts: &parts }].map(|e| Weight::new(e, vocab, cols));
        let outs = [0, 1].map(|_| poisoned(&gpu, ids.len() as u32, cols));
        assert_written(
            &gpu,
            &["gather_quantized:gather", "gather_raw:gather"],
            &ranges([&outs[0], &outs[1]]),
            &[],
            |commands| {
                for (table, out) in tables.iter().zip(&outs) {
                    gather.embed(commands, table, &ids_range, out).unwrap();
                }
            },
        );
        for out in outs {
            for (row, &id) in out.read(&gpu).unwrap().chunks(cols as usize).zip(&ids) {
                assert!(row.iter().all(|x| x.is_nan() == (id >= vocab)), "id {id}: {row:?}");
            }
        }
    }
}

/// Several samples, a window, and shared key heads.
#[test]
fn attention_of_samples() {
    let Some(gpu) = gpu() else { return };
    for (head_dim, window) in [(20, None), (64, Some(9))] {
        let (tokens, heads, kv_heads) = (67, 6, 2);
        let shape = AttentionShape { first: 0, tokens, heads: Heads { heads, kv_heads, head_dim, scale: 0.3, window } };
        let starts: Vec<u32> = (0..tokens).map(|t| if t < 31 { 0 } else { 31 }).collect();
        let starts = words(&gpu, &starts);
        let [(q, _), (d_out, _)] = [1, 2].map(|seed| random_mat(&gpu, seed, tokens, heads * head_dim));
        let [(k, _), (v, _)] = [3, 4].map(|seed| random_mat(&gpu, seed, tokens, kv_heads * head_dim));
        let [out, dq] = [0, 1].map(|_| poisoned(&gpu, tokens, heads * head_dim));
        let [dk, dv] = [0, 1].map(|_| poisoned(&gpu, tokens, kv_heads * head_dim));
        let [lse, delta] = [0, 1].map(|_| poisoned(&gpu, tokens, heads));
        let attention = Attention::new(&gpu, head_dim, None).unwrap();
        let kernels = [
            "attention:forward",
            "attention:key_gradient",
            "attention:query_gradient",
            "attention:row_products",
            "attention:value_gradient",
        ];
        assert_written(&gpu, &kernels, &ranges([&out, &lse, &delta, &dq, &dk, &dv]), &[], |commands| {
            attention.forward(commands, &shape, &q, &k, &v, &starts, &out, &lse).unwrap();
            attention
                .backward(commands, &shape, &q, &k, &v, &starts, &out, &lse, &d_out, &delta, &dq, &dk, &dv, false)
                .unwrap();
        });
    }
}

/// A cache that is full, and one with rows that no token wrote.
#[test]
fn attention_over_a_cache() {
    let Some(gpu) = gpu() else { return };
    for (head_dim, past, tokens, spare) in [(20, 700, 1, 0), (64, 3, 5, 9), (4, 0, 3, 0)] {
        let heads = Heads { heads: 6, kv_heads: 2, head_dim, scale: 0.3, window: None };
        let shape = CachedAttentionShape { tokens, past, heads };
        let (q, _) = random_mat(&gpu, 1, tokens, 6 * head_dim);
        let cache = |seed| {
            let mut rows = random(seed, ((past + tokens) * 2 * head_dim) as usize);
            rows.resize(rows.len() + (spare * 2 * head_dim) as usize, f32::NAN);
            mat(&gpu, past + tokens + spare, 2 * head_dim, &rows)
        };
        let (k, v, out) = (cache(2), cache(3), poisoned(&gpu, tokens, 6 * head_dim));
        let attention = CachedAttention::new(&gpu, head_dim, 3).unwrap();
        let record = |commands: &mut Commands| attention.forward(commands, &shape, &q, &k, &v, &out).unwrap();
        if past + tokens > 128 {
            assert_written(&gpu, &["cached_attention:attend", "cached_attention:combine"], &ranges([&out]), &[], record);
        } else {
            assert_written(&gpu, &["cached_attention:attend"], &ranges([&out]), &[], record);
        }
        assert!(out.read(&gpu).unwrap().iter().all(|x| x.is_finite()));
    }
}

#[test]
fn rotations() {
    let Some(gpu) = gpu() else { return };
    let rotary = Rotary::new(&gpu).unwrap();
    let (tokens, heads, positions) = (33, 3, 17);
    let table = inverse_frequencies(1e4, 10, &crate::arch::config::RopeScaling::Default, 1).upload(&gpu, positions).unwrap();
    // Positions up to the last row of the table, past it, and before the start of the sample.
    let starts: Vec<u32> = (0..tokens).map(|t| if t < 20 { 0 } else { [20, u32::MAX][t as usize % 2] }).collect();
    let starts = words(&gpu, &starts);
    let [(x, _), (dx, _), (from, _)] = [1, 2, 3].map(|seed| random_mat(&gpu, seed, tokens, heads * 10));
    let late = from.narrow(5, heads * 10);
    assert_written(&gpu, &["rotary:rotate", "rotary:rotate_from"], &[], &ranges([&x, &dx, &late]), |commands| {
        rotary.forward(commands, &x, heads, (0, &starts), &table).unwrap();
        rotary.backward(commands, &dx, heads, (0, &starts), &table).unwrap();
        rotary.forward_from(commands, &late, heads, positions - 5, &table).unwrap();
    });
    for mat in [x, dx, late] {
        assert!(mat.read(&gpu).unwrap().iter().all(|x| x.is_finite()));
    }
}

/// Positions up to the last row of the table, past it, and before the start of the sample.
#[test]
fn norms_with_rotations() {
    let Some(gpu) = gpu() else { return };
    let both = NormRotary::new(&gpu).unwrap();
    let (tokens, heads, positions) = (33, 3, 17);
    let table = inverse_frequencies(1e4, 10, &crate::arch::config::RopeScaling::Default, 1).upload(&gpu, positions).unwrap();
    let starts: Vec<u32> = (0..tokens).map(|t| if t < 20 { 0 } else { [20, u32::MAX][t as usize % 2] }).collect();
    let starts = words(&gpu, &starts);
    let [(x, _), (dy, _)] = [1, 2].map(|seed| random_mat(&gpu, seed, tokens, heads * 12));
    let ((gamma, _), [y, dx]) = (random_mat(&gpu, 3, 1, 12), [0, 1].map(|_| poisoned(&gpu, tokens, heads * 12)));
    let turn = Turn { heads, gamma: &gamma, epsilon: 1e-6, first: 0, starts: &starts, table: &table };
    assert_written(&gpu, &["norm_rotary:backward", "norm_rotary:forward"], &ranges([&y, &dx]), &[], |commands| {
        both.forward(commands, &x, &turn, &y).unwrap();
        both.backward(commands, &x, &turn, &dy, &dx).unwrap();
    });
    for mat in [y, dx] {
        assert!(mat.read(&gpu).unwrap().iter().all(|x| x.is_finite()));
    }
}

#[test]
fn norms() {
    let Some(gpu) = gpu() else { return };
    let norm = RmsNorm::new(&gpu).unwrap();
    // Narrow rows share a workgroup; a wide row has its own.
    for (rows, width, per_row) in [(13, 37, 3), (5, 301, 1)] {
        let cols = width * per_row;
        let [(x, _), (dy, _), (added, _)] = [1, 2, 3].map(|seed| random_mat(&gpu, seed, rows, cols));
        let (gamma, _) = random_mat(&gpu, 4, 1, width);
        let [y, dx] = [0, 1].map(|_| poisoned(&gpu, rows, cols));
        assert_written(
            &gpu,
            &["rms_norm:backward", "rms_norm:forward"],
            &ranges([&y, &dx]),
            &ranges([&added]),
            |commands| {
                norm.forward(commands, &x, &gamma, 1e-6, &y).unwrap();
                norm.backward(commands, &x, &gamma, 1e-6, &dy, &dx, false).unwrap();
                norm.backward(commands, &x, &gamma, 1e-6, &dy, &added, true).unwrap();
                norm.forward_add(commands, &x, &gamma, 1e-6, &added).unwrap();
            },
        );
    }
}

#[test]
fn elements() {
    let Some(gpu) = gpu() else { return };
    let (glu, dropout, scale) =
        (Glu::new(&gpu, Activation::Silu).unwrap(), Dropout::new(&gpu).unwrap(), Scale::new(&gpu).unwrap());
    let [(gate, _), (up, _), (dh, _), (added, _), (scaled, _)] = [1, 2, 3, 4, 5].map(|seed| random_mat(&gpu, seed, 11, 73));
    let [h, gelu_h, y] = [0, 1, 2].map(|_| poisoned(&gpu, 11, 73));
    let gelu = Glu::new(&gpu, Activation::GeluTanh).unwrap();
    let kernels = ["dropout:main", "glu:backward", "glu:forward", "scale:main"];
    assert_written(&gpu, &kernels, &ranges([&h, &gelu_h, &y]), &ranges([&gate, &up, &added, &scaled]), |commands| {
        let key = DropoutKey { seed: 1, step: 2, module: 3, window: 0 };
        glu.forward(commands, &gate, &up, &h).unwrap();
        glu.backward(commands, &gate, &up, &dh).unwrap();
        gelu.forward(commands, &gate, &up, &gelu_h).unwrap();
        gelu.backward(commands, &gate, &up, &dh).unwrap();
        dropout.record(commands, 0.3, key, &dh, &y, false).unwrap();
        dropout.record(commands, 0.3, key, &dh, &added, true).unwrap();
        scale.record(commands, 1.5, &scaled).unwrap();
    });
}

/// Labels at and past the end of the vocabulary, and without a loss.
#[test]
fn losses() {
    let Some(gpu) = gpu() else { return };
    let loss = ChunkedLoss::new(&gpu).unwrap();
    let (vocab, first) = (301, 161);
    let labels = [0, vocab - 1, vocab, IGNORE_INDEX, first - 1, first, u32::MAX - 1];
    let tokens = labels.len() as u32;
    let range = words(&gpu, &labels);
    let [(low, _), (high, _)] = [(1, first), (2, vocab - first)].map(|(seed, cols)| random_mat(&gpu, seed, tokens, cols));
    let (state, total) = (poisoned(&gpu, tokens, 4), mat(&gpu, 1, 1, &[1.0]));
    let updated = ranges([&low, &high, &total]);
    assert_written(&gpu, &["loss:accumulate", "loss:finish", "loss:gradient"], &ranges([&state]), &updated, |commands| {
        loss.accumulate(commands, &low, 0, &range, &state).unwrap();
        loss.accumulate(commands, &high, first, &range, &state).unwrap();
        loss.finish(commands, &state, 7, &total).unwrap();
        loss.gradient(commands, &low, 0, &range, &state, 7).unwrap();
        loss.gradient(commands, &high, first, &range, &state, 7).unwrap();
    });
    let found: Vec<f32> = state.read(&gpu).unwrap().chunks(4).map(|token| token[3]).collect();
    for (loss, label) in found.iter().zip(labels) {
        let expected = if label == IGNORE_INDEX { *loss == 0.0 } else { loss.is_finite() == (label < vocab) };
        assert!(expected, "label {label}: {loss}");
    }
    let last = loss.accumulate(&mut gpu.commands("loss"), &low, u32::MAX - first + 1, &range, &state);
    assert!(matches!(last, Err(OpError::Shape { what: "the end of the chunk", .. })), "{last:?}");
}

#[test]
fn searches() {
    let Some(gpu) = gpu() else { return };
    let check = FiniteCheck::new(&gpu, 3).unwrap();
    let (x, mut elements) = random_mat(&gpu, 1, 77, 101);
    elements[7000] = f32::INFINITY;
    let infinite = mat(&gpu, 77, 101, &elements);
    assert_written(&gpu, &["finite:gather", "finite:search"], &[], &[], |commands| {
        check.record(commands, std::slice::from_ref(&x), 0).unwrap();
        check.record(commands, std::slice::from_ref(&infinite), 1).unwrap();
        check.record(commands, std::slice::from_ref(&x), 2).unwrap();
    });
    let found: Vec<Option<u32>> = check.read().unwrap().iter().map(|report| report.map(|report| report.first)).collect();
    assert_eq!(found, [None, Some(7000), None]);
}

#[test]
fn steps_of_the_optimizer() {
    let Some(gpu) = gpu() else { return };
    let count = 2 * 16_384 + 77;
    let adamw = AdamW::new(&gpu, count).unwrap();
    let [(parameters, _), (gradient, _), (exp_avg, _)] = [1, 2, 3].map(|seed| random_mat(&gpu, seed, 1, count));
    let exp_avg_sq = mat(&gpu, 1, count, &random(4, count as usize).into_iter().map(f32::abs).collect::<Vec<_>>());
    let state = AdamWState { parameters, gradient, loss: mat(&gpu, 1, 1, &[1.0]), exp_avg, exp_avg_sq };
    let step =
        AdamWStep { step: 3, learning_rate: 1e-3, betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.01, clip: Some(1.0) };
    let updated = ranges([&state.parameters, &state.exp_avg, &state.exp_avg_sq]);
    assert_written(&gpu, &["optimizer:norm", "optimizer:squares", "optimizer:update"], &[], &updated, |commands| {
        adamw.record(commands, &state, &step).unwrap();
    });
    assert_eq!(adamw.read_report().unwrap().applied, 1.0);
}

/// A draw of each kind: the likeliest token, of all tokens, of the likeliest of few and many
/// tokens.
#[test]
fn choices() {
    let Some(gpu) = gpu() else { return };
    for (vocab, temperature, top_k, top_p, min_p) in [
        (301, 0.0, 0, 1.0, 0.0),
        (1301, 0.7, 0, 1.0, 0.0),
        (301, 1.0, 5, 0.9, 0.0),
        (9001, 0.5, 7, 0.8, 0.0),
        (9001, 0.5, 0, 1.0, 0.3),
    ] {
        let (logits, _) = random_mat(&gpu, 1, 1, vocab);
        let sample = Sample::new(&gpu, vocab).unwrap();
        let (choice, token) = (poisoned(&gpu, 1, 4), poisoned(&gpu, 1, 1));
        let rules = SampleRules { temperature, top_k, top_p, min_p, draw: 0.4 };
        assert_written(&gpu, &["sample:choose", "sample:scan"], &ranges([&choice, &token]), &[], |commands| {
            sample.record(commands, &logits, &rules, &choice.range, &token.range).unwrap();
        });
    }
}

/// Joined weights, gate and up; with a norm, a bias and an addend.
#[test]
fn products_of_few_rows() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(&gpu, None).unwrap();
    let (outputs, inputs) = (42, 7 * 32);
    for (i, scale_type) in SCALES.into_iter().enumerate() {
        let nf4 = quantized(&gpu, scale_type, outputs * inputs);
        let float_type = TYPES[1 + i % 2];
        let parts = raw(&gpu, float_type, outputs * inputs);
        let stored = [Elements::Quantized(&nf4), Elements::Raw { float_type, parts: &parts }];
        for (elements, kernel) in stored.into_iter().zip(["matmul_wide_quantized:main", "matmul_wide_raw:main"]) {
            let whole = Weight::new(elements, outputs, inputs);
            let halves = [whole.rows(0..21), whole.rows(21..42)];
            for rows in [1, 3, 8] {
                let ((x, _), (gamma, _)) = (random_mat(&gpu, 1, rows, inputs), random_mat(&gpu, 2, 1, inputs));
                let ((bias, _), (addend, _)) = (random_mat(&gpu, 3, 1, outputs), random_mat(&gpu, 4, rows, 21));
                let [all, joined] = [0, 1].map(|_| poisoned(&gpu, rows, outputs));
                let gated = poisoned(&gpu, rows, 21);
                assert_written(&gpu, &[kernel], &ranges([&all, &joined, &gated]), &[], |commands| {
                    let pair = [&halves[0], &halves[1]];
                    let norm = Some((&gamma, 0.1));
                    let mut record = |wide: Wide<'_>, out| assert!(matmul.wide(commands, &x, &wide, out).unwrap());
                    record(Wide { bias: Some(&bias), ..Wide::of(&[&whole]) }, &all);
                    record(Wide { norm, ..Wide::of(&pair) }, &joined);
                    record(Wide { join: Join::Gated, norm, addend: Some(&addend), ..Wide::of(&pair) }, &gated);
                });
            }
        }
    }
}

/// A cache of one run and of several, whose row for the token is not yet written.
#[test]
fn attention_of_a_joined_token() {
    let Some(gpu) = gpu() else { return };
    for (past, kernels) in [
        (9, &["cached_attention_joined:attend"][..]),
        (700, &["cached_attention_joined:attend", "cached_attention_joined:combine"]),
    ] {
        let heads = Heads { heads: 6, kv_heads: 2, head_dim: 24, scale: 0.3, window: None };
        let attention = CachedAttention::new(&gpu, 24, 3).unwrap();
        let (joined, _) = random_mat(&gpu, 1, 1, 10 * 24);
        let [(query, _), (key, _)] = [2, 3].map(|seed| random_mat(&gpu, seed, 1, 24));
        let (table, _) = random_mat(&gpu, 4, past + 1, 24);
        let caches = [5, 6].map(|seed| random_mat(&gpu, seed, past + 2, 48).0);
        let out = poisoned(&gpu, 1, 6 * 24);
        for norms in [None, Some(([&query, &key], 0.1))] {
            let of = JoinedHeads { joined: &joined, heads, past, norms, angles: Some((&table, past)) };
            let [keys, values] = &caches;
            assert_written(&gpu, kernels, &ranges([&out]), &ranges([keys, values]), |commands| {
                assert!(attention.forward_joined(commands, &of, [keys, values], &out).unwrap());
            });
        }
    }
}

#[test]
fn splits_into_heads() {
    let Some(gpu) = gpu() else { return };
    let split = SplitHeads::new(&gpu).unwrap();
    let heads = Heads { heads: 3, kv_heads: 1, head_dim: 20, scale: 1.0, window: None };
    let (joined, _) = random_mat(&gpu, 1, 2, 5 * 20);
    let [(query, _), (key, _)] = [2, 3].map(|seed| random_mat(&gpu, seed, 1, 20));
    let (table, _) = random_mat(&gpu, 4, 9, 20);
    let queries = poisoned(&gpu, 2, 60);
    let [keys, values] = [0, 1].map(|_| mat(&gpu, 7, 20, &[0.0; 140]));
    let (part, _) = random_mat(&gpu, 5, 9, 12);
    for (norms, table) in [(None, &table), (Some(([&query, &key], 0.1)), &table), (None, &part)] {
        let of = JoinedHeads { joined: &joined, heads, past: 4, norms, angles: Some((table, 6)) };
        assert_written(&gpu, &["split_heads:main"], &ranges([&queries]), &ranges([&keys, &values]), |commands| {
            split.record(commands, &of, &queries, [&keys, &values]).unwrap();
        });
    }
}
