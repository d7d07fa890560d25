// What every product of matrices is given, whichever way it is cut: a part of those kernels.

struct Params {
    m: u32,
    n: u32,
    k: u32,
    chunk: u32,         // terms of each sum that a workgroup adds up: a multiple of TK
    groups: u32,        // workgroups that have work
    a_first: u32,       // element of a[0, 0]
    a_row: u32,         // elements from a[i, t] to a[i + 1, t]
    a_term: u32,        // elements from a[i, t] to a[i, t + 1]
    b_first: u32,       // element of b[0, 0]; likewise
    b_column: u32,
    b_term: u32,
    out_first: u32,     // element of out[0, 0]; likewise
    out_row: u32,
    out_chunk: u32,     // elements from the sums of one chunk to those of the next
    bias_first: u32,
    has_bias: u32,
    add: u32,           // 1 where the product is added to what `out` holds
    scale: f32,
    block_first: u32,   // quantised: elements of its block that lie before b[0, 0]
    block_bits: u32,    // quantised: log2 of the elements in a block
    scales_first: u32,  // quantised: see the codec
    supers_first: u32,
    zero: u32,
    pad: u32,
    codebook: array<vec4<f32>, 4>,
}

// Bindings 0 to 3 are b's.
@group(0) @binding(4) var<storage, read> a: array<f32>;
@group(0) @binding(5) var<storage, read> bias: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;
