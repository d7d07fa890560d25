// Products of few rows with one to three weights of whole vectors: out[m, n] = scale * (r * x[m, k]
// w[n, k]^T (+ bias)) (+ addend) with m <= M. LANES threads share four columns of the result, and
// read each weight once, 16 bytes at a time: a chunk of CHUNK terms. This file is combined with a
// file for the storage of the weights, which has CHUNK, `prepare`, `Loaded`, `load` and
// `add_chunk`. The columns of the result are the rows of all weights, one weight after another, or,
// if GATED, silu(gate) * up of two weights. If NORM, r is the factor of the RMS norm of a row of x,
// and its elements are multiplied by gamma.
//
// The threads of a workgroup read x from a slab in workgroup memory, in which the vectors that they
// read at the same time are neighbours. In x they are a chunk apart, so each would be in a cache
// line of its own.
//
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
override LANES: u32 = 32u;      // threads of four columns, a power of two, at least M
override QUADS: u32 = 4u;       // four columns each, of a workgroup; a power of two
override ROUNDS: u32 = 1u;      // chunks of a slab for each thread
override NORM: bool = false;
override GATED: bool = false;
override SLAB_ROW: u32 = 264u;  // PER * (LANES * ROUNDS + 1)
override SHARED: u32 = 264u;    // the larger of M * SLAB_ROW and M * QUADS * LANES
override SQUARES: u32 = 1u;     // M * QUADS * LANES if NORM, else 1
override COPIES: u32 = 2u;      // vec4s of a row of a slab that a thread copies
override AHEAD: bool = true;    // M = 1 and COPIES at most 4: slabs are loaded one ahead

// vec4s of x in a chunk.
const PER = CHUNK / 4u;

// At first a slab of x. Vector j of chunk c of a row is at j * (LANES * ROUNDS + 1) + c: with the
// 1, threads that write neighbours in x use different banks. At the end the sums of the threads, by
// row, quad and lane.
var<workgroup> pool: array<vec4<f32>, SHARED>;
var<workgroup> squares: array<f32, SQUARES>;

// A vector of the four columns for each row.
struct Sums {
    r0: vec4<f32>,
    r1: vec4<f32>,
    r2: vec4<f32>,
    r3: vec4<f32>,
    r4: vec4<f32>,
    r5: vec4<f32>,
    r6: vec4<f32>,
    r7: vec4<f32>,
}

// Sums of squares of the terms that a thread has copied, for each row.
struct Squares {
    low: vec4<f32>,
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

// A vec4 of x on its way to a slab, and its gamma.
struct Loading {
    vector: vec4<f32>,
    gamma: vec4<f32>,
}

// Vector `number` of those that a thread copies to the slab from vec4 `start` on.
fn fetch(row: u32, start: u32, number: u32, thread: u32) -> Loading {
    var loading: Loading;
    let i = number * QUADS * LANES + thread;
    if (number < COPIES && i < PER * LANES * ROUNDS && start + i < params.x_row) {
        // Rows past the last are copies of the last row. Their sums are not stored.
        loading.vector = x[params.x_first + min(row, params.m - 1u) * params.x_row + start + i];
        if (NORM) { loading.gamma = gamma[start + i]; }
    }
    return loading;
}

// Places a vector in the slab. Returns its sum of squares.
fn place(row: u32, number: u32, thread: u32, loading: Loading) -> f32 {
    let i = number * QUADS * LANES + thread;
    if (number >= COPIES || i >= PER * LANES * ROUNDS) {
        return 0.0;
    }
    let at = row * SLAB_ROW + i % PER * (LANES * ROUNDS + 1u) + i / PER;
    if (NORM) {
        pool[at] = loading.vector * loading.gamma;
        return dot(loading.vector, loading.vector);
    }
    pool[at] = loading.vector;
    return 0.0;
}

// Copies a row of a slab. Returns the sum of squares of the thread's vectors.
fn copy_row(row: u32, start: u32, thread: u32) -> f32 {
    var sum = 0.0;
    for (var number = 0u; number < COPIES && row < M; number++) {
        sum += place(row, number, thread, fetch(row, start, number, thread));
    }
    return sum;
}

fn copy_rows(before: Squares, start: u32, thread: u32) -> Squares {
    let low = vec4(copy_row(0u, start, thread), copy_row(1u, start, thread), copy_row(2u, start, thread), copy_row(3u, start, thread));
    let high = vec4(copy_row(4u, start, thread), copy_row(5u, start, thread), copy_row(6u, start, thread), copy_row(7u, start, thread));
    return Squares(before.low + low, before.high + high);
}

// The next slab of a single row, if a thread copies few vectors.
struct Ahead {
    l0: Loading,
    l1: Loading,
    l2: Loading,
    l3: Loading,
}

fn fetch_all(start: u32, thread: u32) -> Ahead {
    return Ahead(fetch(0u, start, 0u, thread), fetch(0u, start, 1u, thread), fetch(0u, start, 2u, thread), fetch(0u, start, 3u, thread));
}

fn place_all(thread: u32, ahead: Ahead) -> f32 {
    let first = place(0u, 0u, thread, ahead.l0) + place(0u, 1u, thread, ahead.l1);
    return first + place(0u, 2u, thread, ahead.l2) + place(0u, 3u, thread, ahead.l3);
}

// Terms 8 * eight .. of chunk `c` of a row of the slab, times the four columns.
fn times(row: u32, c: u32, eight: u32, w: Eight) -> vec4<f32> {
    let at = row * SLAB_ROW + 2u * eight * (LANES * ROUNDS + 1u) + c;
    let a = pool[at];
    let b = pool[at + LANES * ROUNDS + 1u];
    return a.x * w.w0 + a.y * w.w1 + a.z * w.w2 + a.w * w.w3 + b.x * w.w4 + b.y * w.w5 + b.z * w.w6 + b.w * w.w7;
}

// Adds eight terms. Every index is a constant, so the sums stay in registers.
fn add_eight(sums: Sums, c: u32, eight: u32, w: Eight) -> Sums {
    var s = sums;
    s.r0 += times(0u, c, eight, w);
    if (M > 1u) { s.r1 += times(1u, c, eight, w); }
    if (M > 2u) {
        s.r2 += times(2u, c, eight, w);
        s.r3 += times(3u, c, eight, w);
    }
    if (M > 4u) {
        s.r4 += times(4u, c, eight, w);
        s.r5 += times(5u, c, eight, w);
        s.r6 += times(6u, c, eight, w);
        s.r7 += times(7u, c, eight, w);
    }
    return s;
}

// Adds the sums of a chunk, times the scales of the columns.
fn add_scaled(sums: Sums, chunk: Sums, scales: vec4<f32>) -> Sums {
    return Sums(
        sums.r0 + scales * chunk.r0,
        sums.r1 + scales * chunk.r1,
        sums.r2 + scales * chunk.r2,
        sums.r3 + scales * chunk.r3,
        sums.r4 + scales * chunk.r4,
        sums.r5 + scales * chunk.r5,
        sums.r6 + scales * chunk.r6,
        sums.r7 + scales * chunk.r7,
    );
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
        pool[row * QUADS * LANES + thread] = sum;
        if (NORM) {
            squares[row * QUADS * LANES + thread] = square;
        }
    }
}

// Adds up the sums of the lanes, and the squares of all threads.
fn reduce(lane: u32, thread: u32) {
    for (var half = QUADS * LANES / 2u; half >= select(QUADS, 1u, NORM); half /= 2u) {
        workgroupBarrier();
        let lanes = half / QUADS;
        for (var row = 0u; row < M; row++) {
            let at = row * QUADS * LANES + thread;
            if (lane < lanes) { pool[at] += pool[at + lanes]; }
            if (NORM) {
                if (thread < half) { squares[at] += squares[at + half]; }
            }
        }
    }
    workgroupBarrier();
}

// What is added to the results of a row of four columns from `first` on: all loads at once, early,
// so that nothing waits for them. Columns past the last are copies of the last.
fn addends_of(row: u32, first: u32) -> vec4<f32> {
    if (params.add == 0u) {
        return vec4<f32>();
    }
    let shift = select(0u, 1u, GATED);
    let start = params.out_first + row * params.out_row;
    let columns = min(vec4(first >> shift) + vec4(0u, 1u, 2u, 3u), vec4((params.n >> shift) - 1u));
    let at = start + columns;
    return vec4(addend[at.x], addend[at.y], addend[at.z], addend[at.w]);
}

fn store(row: u32, column: u32, value: f32) {
    out[params.out_first + row * params.out_row + column] = value;
}

fn sigmoid(value: f32) -> f32 {
    let e = exp(-abs(value));
    return select(e, 1.0, value >= 0.0) / (1.0 + e);
}

// Stores the sums of a row of four columns from `first` on.
fn store_row(row: u32, first: u32, at: u32, added: vec4<f32>) {
    var sum = pool[at];
    if (NORM) {
        sum *= inverseSqrt(squares[row * QUADS * LANES] / f32(params.k) + params.epsilon);
    }
    if (GATED) {
        sum *= params.scale;
        // The number of columns is even.
        if (first < params.n) {
            store(row, first / 2u, sum.x * sigmoid(sum.x) * sum.y + added.x);
        }
        if (first + 2u < params.n) {
            store(row, first / 2u + 1u, sum.z * sigmoid(sum.z) * sum.w + added.y);
        }
        return;
    }
    for (var i = 0u; i < 4u && first + i < params.n; i++) {
        var value = sum[i];
        if (params.has_bias == 1u) { value += bias[first + i]; }
        store(row, first + i, params.scale * value + added[i]);
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
    var own: Squares;
    var added: vec4<f32>;
    // A lane stores a row.
    if (lane < min(M, params.m)) {
        added = addends_of(lane, first);
    }
    var next: Loaded;
    // The loads of the next round are under way while the present round multiplies.
    if (lane < params.chunks) {
        next = load(columns, lane);
    }
    var ahead: Ahead;
    if (AHEAD) { ahead = fetch_all(0u, thread); }
    prepare(thread, LANES * QUADS);
    for (var start = 0u; start < params.chunks; start += LANES * ROUNDS) {
        if (start > 0u) { workgroupBarrier(); }
        if (AHEAD) { own.low.x += place_all(thread, ahead); } else { own = copy_rows(own, PER * start, thread); }
        workgroupBarrier();
        if (AHEAD) { ahead = fetch_all(PER * (start + LANES * ROUNDS), thread); }
        for (var round = 0u; round < ROUNDS; round++) {
            let c = round * LANES + lane;
            let chunk = start + c;
            let loaded = next;
            if (chunk + LANES < params.chunks) {
                next = load(columns, chunk + LANES);
            }
            if (chunk < params.chunks) {
                sums = add_chunk(sums, c, chunk, columns, loaded);
            }
        }
    }
    workgroupBarrier();
    keep(0u, thread, sums.r0, own.low.x);
    keep(1u, thread, sums.r1, own.low.y);
    keep(2u, thread, sums.r2, own.low.z);
    keep(3u, thread, sums.r3, own.low.w);
    keep(4u, thread, sums.r4, own.high.x);
    keep(5u, thread, sums.r5, own.high.y);
    keep(6u, thread, sums.r6, own.high.z);
    keep(7u, thread, sums.r7, own.high.w);
    reduce(lane, thread);
    if (lane < min(M, params.m) && first < params.n) {
        store_row(lane, first, (lane * QUADS + local.y) * LANES, added);
    }
}
