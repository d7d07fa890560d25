// Parameters and bindings of every matrix product. Included by those kernels.

struct Params {
    m: u32,
    n: u32,
    k: u32,
    chunk: u32,         // terms per workgroup in each sum: a multiple of TK
    groups: u32,        // workgroups with work
    a_first: u32,       // index of a[0, 0]
    a_row: u32,         // elements from a[i, t] to a[i + 1, t]
    a_term: u32,        // elements from a[i, t] to a[i, t + 1]
    b_first: u32,       // index of b[0, 0]; strides as for a
    b_column: u32,
    b_term: u32,
    out_first: u32,     // index of out[0, 0]; strides as for a
    out_row: u32,
    out_chunk: u32,     // elements between the sums of adjacent chunks
    bias_first: u32,
    has_bias: u32,
    add: u32,           // 1 to add the product to `out`
    scale: f32,
    block_first: u32,   // quantised: offset of b[0, 0] in its block
    block_bits: u32,    // quantised: log2 of the block size
    scales_first: u32,  // quantised: see the codec
    supers_first: u32,
    zero: u32,
    pad: u32,
    codebook: array<vec4<f32>, 4>,
}

// Bindings 0 to 3 hold b.
@group(0) @binding(4) var<storage, read> a: array<f32>;
@group(0) @binding(5) var<storage, read> bias: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;
