// Attention on matrix units: the parameters, scales and masks of its kernels.
//
// Operands are f16 copies, [heads, rows, 8 * VECS] for each tensor, with zeros after the last token
// and after the last element of a head. Queries, and what belongs to them, start at token `first`
// and have `query_rows` rows; keys and values start at token 0 and have `rows` rows. The heads of
// queries that share keys have one factor, and so has each head of keys and values: a power of two
// that brings the largest magnitude below 2^15.

struct Params {
    tokens: u32,     // keys; the end of the queries
    heads: u32,      // query heads, a multiple of kv_heads
    kv_heads: u32,
    scale: f32,      // of the scores
    window: u32,     // size of the attention window, including the token itself
    rows: u32,       // of a head in the copies: a multiple of BLOCK
    training: u32,   // 1 in the backward pass
    first: u32,      // the first query
    query_rows: u32, // of a head in the copies of queries: a multiple of BLOCK
    add: u32,        // 1: the gradients of keys and values are added to those that are there
    pad0: u32,
    pad1: u32,
}

@group(1) @binding(0) var<uniform> params: Params;

const THREADS = 128u;
const BLOCK = 64u;            // tokens of a workgroup
const LOWEST = -1e30;         // below every score, and far enough from infinity
const LOG2_E = 1.4426950408889634;
const LN_2 = 0.6931471805599453;
// Score gradients have this factor less, as powers of two: sums of 256 products below 2^30 fit f16.
const SLOPE_EXPONENT = 24;

// Tensors, in the order of their exponents.
const QUERIES = 0u;
const KEYS = 1u;
const VALUES = 2u;
const D_OUT = 3u;            // the gradient of the output

// The first token that a token attends to: the start of its sample or of its window. It is at most
// the token itself, whatever `start` is.
fn first_key_of(token: u32, start: u32) -> u32 {
    return min(max(start, token + 1u - min(token + 1u, params.window)), token);
}

// 2^exponent, for exponents from -126 to 127.
fn power(exponent: i32) -> f32 {
    return bitcast<f32>(u32(exponent + 127) << 23u);
}

// The exponent of the factor, if the largest finite magnitude has these bits.
fn exponent_of(highest: u32) -> i32 {
    return clamp(141 - i32(highest >> 23u), -50, 50);
}

// By how many powers of two a row is smaller than the largest row under the same factor.
fn drop_of(highest: u32, row: u32) -> u32 {
    return u32(clamp(i32(highest >> 23u) - i32(row >> 23u), 0, 40));
}

// The gradient of a key adds score gradients times queries. A query whose output has a small
// gradient has small score gradients, too. f16 could lose them, so they are scaled up, and the copy
// of the query is scaled down by this number of powers of two.
fn balance_of(drop: u32) -> i32 {
    return i32(min(drop / 2u, 14u));
}
