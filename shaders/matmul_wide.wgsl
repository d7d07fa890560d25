// Products of few rows with one to three weights of whole vectors: out[m, n] = scale * (r * x[m, k]
// w[n, k]^T (+ bias)) (+ addend) with m <= M. LANES threads share four columns of the result, and
// read each weight once, 16 bytes at a time. This file is combined with a file for the storage of
// the weights, which has `prepare`, `Loaded`, `load` and `add_chunk`. The columns of the result are
// the rows of all weights, one weight after another, or, if GATED, silu(gate) * up of two weights.
// If NORM, r is the factor of the RMS norm of a row of x, and its elements are multiplied by gamma.
// Runs unchecked: `ops::matmul::wide` proves on the host that every index is in its binding.

struct Params {
    m: u32,
    n: u32,             // rows of all weights
    k: u32,
    chunks: u32,        // of CHUNK terms
    groups: u32,        // workgroups with work
    x_first: u32,       // index of the first vec4
    x_row: u32,         // vec4s of a row
    out_first: u32,
    out_row: u32,
    has_bias: u32,
    add: u32,           // 1 to add `addend`
    block_bits: u32,    // quantised: log2 of the block size
    scale: f32,
    epsilon: f32,       // NORM
    zero: u32,
    pad: u32,
    // Of each weight: the index of its first vec4 and, if it is quantised, the indices of the first
    // word of scales, super-scales and head.
    places: array<vec4<u32>, 3>,
    // Of each weight: the end of its columns and, if it is quantised, the element at its first
    // vec4.
    ends: array<vec4<u32>, 3>,
    codebook: array<vec4<f32>, 4>,
}

@group(0) @binding(0) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> words: array<u32>;         // quantised: scales
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;       // [m, k]
@group(0) @binding(3) var<storage, read> gamma: array<vec4<f32>>;   // NORM: [k]
@group(0) @binding(4) var<storage, read> bias: array<f32>;          // [n]
@group(0) @binding(5) var<storage, read_write> out: array<f32>;     // [m, n], GATED: [m, n / 2]
@group(0) @binding(6) var<storage, read> addend: array<f32>;        // as out
@group(1) @binding(0) var<uniform> params: Params;

override M: u32 = 1u;           // rows: 1, 2, 4 or 8
override LANES: u32 = 32u;      // threads of four columns, a power of two
override QUADS: u32 = 2u;       // four columns each, of a workgroup
override NORM: bool = false;
override GATED: bool = false;
override PARTIAL: u32 = 64u;    // M * QUADS * LANES
override SQUARES: u32 = 1u;     // the same if NORM, else 1

// Sums of the threads, by row, quad and lane.
var<workgroup> partial: array<vec4<f32>, PARTIAL>;
var<workgroup> squares: array<f32, SQUARES>;

// A vector of the four columns for each row, and the sum of squares of its terms.
struct Sums {
    r0: vec4<f32>,
    r1: vec4<f32>,
    r2: vec4<f32>,
    r3: vec4<f32>,
    r4: vec4<f32>,
    r5: vec4<f32>,
    r6: vec4<f32>,
    r7: vec4<f32>,
    low: vec4<f32>,     // squares of rows 0 to 3
    high: vec4<f32>,
}

// Eight terms of four columns.
struct Eight {
    w0: vec4<f32>,
    w1: vec4<f32>,
    w2: vec4<f32>,
    w3: vec4<f32>,
    w4: vec4<f32>,
    w5: vec4<f32>,
    w6: vec4<f32>,
    w7: vec4<f32>,
}

// Where four columns start.
struct Columns {
    starts: vec4<u32>,      // indices of vec4s
    elements: vec4<u32>,    // quantised: indices of elements in their weight
    numbers: vec4<u32>,     // of their weights
}

struct Product {
    sum: vec4<f32>,
    squares: f32,
}

// Eight terms of a row of x, from vec4 `at` on, times the four columns.
fn times(row: u32, at: u32, w: Eight) -> Product {
    // Rows past the last are copies of the last row. Their sums are not stored.
    let first = params.x_first + min(row, params.m - 1u) * params.x_row + at;
    var a = x[first];
    var b = x[first + 1u];
    var product = Product(vec4<f32>(), 0.0);
    if (NORM) {
        product.squares = dot(a, a) + dot(b, b);
        a *= gamma[at];
        b *= gamma[at + 1u];
    }
    product.sum = a.x * w.w0 + a.y * w.w1 + a.z * w.w2 + a.w * w.w3 + b.x * w.w4 + b.y * w.w5 + b.z * w.w6 + b.w * w.w7;
    return product;
}

// Adds eight terms, times the scales of the columns. Every index is a constant, so the sums stay in
// registers.
fn add_eight(sums: Sums, at: u32, w: Eight, scales: vec4<f32>) -> Sums {
    var s = sums;
    let p0 = times(0u, at, w);
    s.r0 += scales * p0.sum;
    s.low.x += p0.squares;
    if (M > 1u) {
        let p1 = times(1u, at, w);
        s.r1 += scales * p1.sum;
        s.low.y += p1.squares;
    }
    if (M > 2u) {
        let p2 = times(2u, at, w);
        let p3 = times(3u, at, w);
        s.r2 += scales * p2.sum;
        s.r3 += scales * p3.sum;
        s.low.z += p2.squares;
        s.low.w += p3.squares;
    }
    if (M > 4u) {
        let p4 = times(4u, at, w);
        let p5 = times(5u, at, w);
        let p6 = times(6u, at, w);
        let p7 = times(7u, at, w);
        s.r4 += scales * p4.sum;
        s.r5 += scales * p5.sum;
        s.r6 += scales * p6.sum;
        s.r7 += scales * p7.sum;
        s.high += vec4(p4.squares, p5.squares, p6.squares, p7.squares);
    }
    return s;
}

// The weight of a column of the result, and its row there. Columns past the last are the last.
fn place_of(column: u32) -> vec2<u32> {
    let c = min(column, params.n - 1u);
    if (GATED) {
        return vec2(c % 2u, c / 2u);
    }
    if (c < params.ends[0].x) {
        return vec2(0u, c);
    }
    if (c < params.ends[1].x) {
        return vec2(1u, c - params.ends[0].x);
    }
    return vec2(2u, c - params.ends[1].x);
}

fn columns_of(first: u32) -> Columns {
    var columns: Columns;
    let a = place_of(first);
    let b = place_of(first + 1u);
    let c = place_of(first + 2u);
    let d = place_of(first + 3u);
    columns.numbers = vec4(a.x, b.x, c.x, d.x);
    let rows = vec4(a.y, b.y, c.y, d.y);
    let firsts = vec4(params.places[a.x].x, params.places[b.x].x, params.places[c.x].x, params.places[d.x].x);
    columns.starts = firsts + rows * params.chunks;
    let elements = vec4(params.ends[a.x].y, params.ends[b.x].y, params.ends[c.x].y, params.ends[d.x].y);
    columns.elements = elements + rows * params.k;
    return columns;
}

fn keep(row: u32, thread: u32, sum: vec4<f32>, square: f32) {
    if (row < M) {
        partial[row * QUADS * LANES + thread] = sum;
        if (NORM) {
            squares[row * QUADS * LANES + thread] = square;
        }
    }
}

fn store(row: u32, column: u32, sum: f32) {
    let at = params.out_first + row * params.out_row + column;
    var value = sum;
    if (params.add == 1u) { value += addend[at]; }
    out[at] = value;
}

fn sigmoid(value: f32) -> f32 {
    let e = exp(-abs(value));
    return select(e, 1.0, value >= 0.0) / (1.0 + e);
}

// Stores the sums of a row of four columns from `first` on.
fn store_row(row: u32, first: u32, at: u32) {
    var sum = partial[at];
    if (NORM) {
        sum *= inverseSqrt(squares[at] / f32(params.k) + params.epsilon);
    }
    if (GATED) {
        sum *= params.scale;
        // The number of columns is even.
        if (first < params.n) {
            store(row, first / 2u, sum.x * sigmoid(sum.x) * sum.y);
        }
        if (first + 2u < params.n) {
            store(row, first / 2u + 1u, sum.z * sigmoid(sum.z) * sum.w);
        }
        return;
    }
    for (var i = 0u; i < 4u && first + i < params.n; i++) {
        var value = sum[i];
        if (params.has_bias == 1u) { value += bias[first + i]; }
        store(row, first + i, params.scale * value);
    }
}

@compute @workgroup_size(LANES, QUADS)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let group = id.x + id.y * grid.x;
    if (group >= params.groups) {
        return;
    }
    let lane = local.x;
    let thread = local.y * LANES + lane;
    let first = 4u * (group * QUADS + local.y);
    let columns = columns_of(first);
    var sums: Sums;
    var next: Loaded;
    // The loads of the next round are under way while the present round multiplies.
    if (lane < params.chunks) {
        next = load(columns, lane);
    }
    prepare(thread, LANES * QUADS);
    for (var chunk = lane; chunk < params.chunks; chunk += LANES) {
        let loaded = next;
        if (chunk + LANES < params.chunks) {
            next = load(columns, chunk + LANES);
        }
        sums = add_chunk(sums, chunk, columns, loaded);
    }
    keep(0u, thread, sums.r0, sums.low.x);
    keep(1u, thread, sums.r1, sums.low.y);
    keep(2u, thread, sums.r2, sums.low.z);
    keep(3u, thread, sums.r3, sums.low.w);
    keep(4u, thread, sums.r4, sums.high.x);
    keep(5u, thread, sums.r5, sums.high.y);
    keep(6u, thread, sums.r6, sums.high.z);
    keep(7u, thread, sums.r7, sums.high.w);
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        for (var row = 0u; row < M && lane < half; row++) {
            let at = row * QUADS * LANES + thread;
            partial[at] += partial[at + half];
            if (NORM) {
                squares[at] += squares[at + half];
            }
        }
    }
    workgroupBarrier();
    // A lane stores a row.
    if (lane < min(M, params.m) && first < params.n) {
        store_row(lane, first, (lane * QUADS + local.y) * LANES);
    }
}
