// Attention of new tokens over a KV cache ("flash-decoding"). A workgroup takes GROUP query heads
// of one token, which share a key head, and a run of the keys, with an online softmax. `combine`
// joins the runs. Runs unchecked: `ops::cached_attention` proves on the host that every index is in
// its tensor.

struct Params {
    tokens: u32,     // new tokens
    past: u32,       // earlier tokens in the cache
    heads: u32,      // query heads, a multiple of GROUP * kv_heads
    kv_heads: u32,
    splits: u32,     // runs of keys
    run: u32,        // keys of a run, a multiple of KEYS
    scale: f32,      // of the scores
    window: u32,     // size of the attention window, including the token itself
    first: u32,      // first key of any token; runs start there
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;          // [tokens, heads, HEAD]
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;          // [past + tokens, kv_heads, HEAD]
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;  // [tokens, heads, HEAD]
@group(0) @binding(4) var<storage, read_write> parts: array<vec4<f32>>;   // [splits, tokens, heads, HEAD + 1]: sums, then the fields of Part
@group(1) @binding(0) var<uniform> params: Params;

override HEAD: u32 = 32u;       // vec4s of a head, at most WORKGROUP
override GROUP: u32 = 1u;       // at most 8
override QUERY: u32 = 32u;      // GROUP * HEAD
override WEIGHTS: u32 = 128u;   // GROUP * KEYS
override HIGHS: u32 = 16u;      // GROUP * PARTS
const WORKGROUP = 128u;
const KEYS = WORKGROUP;     // keys per step
const PARTS = 16u;          // of the keys of a step
const LOWEST = -1e38;       // below every score, and far enough from infinity

var<workgroup> query: array<vec4<f32>, QUERY>;
var<workgroup> weights: array<f32, WEIGHTS>;        // [GROUP, KEYS]; or scores
var<workgroup> highs: array<f32, HIGHS>;            // [GROUP, PARTS]: highest scores
var<workgroup> sums: array<vec4<f32>, WORKGROUP>;
var<workgroup> totals: array<f32, WORKGROUP>;

// A number for each query head of the group.
struct Numbers {
    low: vec4<f32>,
    high: vec4<f32>,
}

// The scores of key `first + thread`, or LOWEST from `end` on.
fn scores_of(row: u32, exists: bool) -> Numbers {
    var scores = Numbers(vec4(LOWEST), vec4(LOWEST));
    if (exists) {
        scores = Numbers();
        for (var column = 0u; column < HEAD; column++) {
            let key = k[row + column];
            scores.low.x += dot(query[column], key);
            if (GROUP > 1u) { scores.low.y += dot(query[HEAD + column], key); }
            if (GROUP > 2u) { scores.low.z += dot(query[2u * HEAD + column], key); }
            if (GROUP > 3u) { scores.low.w += dot(query[3u * HEAD + column], key); }
            if (GROUP > 4u) { scores.high.x += dot(query[4u * HEAD + column], key); }
            if (GROUP > 5u) { scores.high.y += dot(query[5u * HEAD + column], key); }
            if (GROUP > 6u) { scores.high.z += dot(query[6u * HEAD + column], key); }
            if (GROUP > 7u) { scores.high.w += dot(query[7u * HEAD + column], key); }
        }
        scores.low *= params.scale;
        scores.high *= params.scale;
    }
    return scores;
}

fn keep(number: u32, thread: u32, value: f32) {
    if (number < GROUP) {
        weights[number * KEYS + thread] = value;
    }
}

// Stores a number of the thread's key for each head.
fn keep_all(thread: u32, values: Numbers) {
    keep(0u, thread, values.low.x);
    keep(1u, thread, values.low.y);
    keep(2u, thread, values.low.z);
    keep(3u, thread, values.low.w);
    keep(4u, thread, values.high.x);
    keep(5u, thread, values.high.y);
    keep(6u, thread, values.high.z);
    keep(7u, thread, values.high.w);
}

// The maximum of `top` and the stored scores of a head.
fn highest_of(number: u32, top: f32) -> f32 {
    var highest = top;
    if (number < GROUP) {
        for (var i = 0u; i < PARTS; i++) {
            highest = max(highest, highs[number * PARTS + i]);
        }
    }
    return highest;
}

// The maxima of `top` and the scores of all threads, which are then in `weights`.
fn all_highest(scores: Numbers, top: Numbers, thread: u32) -> Numbers {
    keep_all(thread, scores);
    workgroupBarrier();
    for (var i = thread; i < GROUP * PARTS; i += WORKGROUP) {
        let start = i * (KEYS / PARTS);
        var high = weights[start];
        for (var j = 1u; j < KEYS / PARTS; j++) {
            high = max(high, weights[start + j]);
        }
        highs[i] = high;
    }
    workgroupBarrier();
    let low = vec4(highest_of(0u, top.low.x), highest_of(1u, top.low.y), highest_of(2u, top.low.z), highest_of(3u, top.low.w));
    let high = vec4(highest_of(4u, top.high.x), highest_of(5u, top.high.y), highest_of(6u, top.high.z), highest_of(7u, top.high.w));
    return Numbers(low, high);
}

// Sums of weighted values of a column, for each head.
struct Sums {
    s0: vec4<f32>,
    s1: vec4<f32>,
    s2: vec4<f32>,
    s3: vec4<f32>,
    s4: vec4<f32>,
    s5: vec4<f32>,
    s6: vec4<f32>,
    s7: vec4<f32>,
}

fn shrunk(sums: Sums, shrink: Numbers) -> Sums {
    return Sums(
        sums.s0 * shrink.low.x,
        sums.s1 * shrink.low.y,
        sums.s2 * shrink.low.z,
        sums.s3 * shrink.low.w,
        sums.s4 * shrink.high.x,
        sums.s5 * shrink.high.y,
        sums.s6 * shrink.high.z,
        sums.s7 * shrink.high.w,
    );
}

// Adds the values of key `i` of the step.
fn add_value(sums: Sums, i: u32, value: vec4<f32>) -> Sums {
    var s = sums;
    s.s0 += weights[i] * value;
    if (GROUP > 1u) { s.s1 += weights[KEYS + i] * value; }
    if (GROUP > 2u) { s.s2 += weights[2u * KEYS + i] * value; }
    if (GROUP > 3u) { s.s3 += weights[3u * KEYS + i] * value; }
    if (GROUP > 4u) { s.s4 += weights[4u * KEYS + i] * value; }
    if (GROUP > 5u) { s.s5 += weights[5u * KEYS + i] * value; }
    if (GROUP > 6u) { s.s6 += weights[6u * KEYS + i] * value; }
    if (GROUP > 7u) { s.s7 += weights[7u * KEYS + i] * value; }
    return s;
}

// Adds up a head over the threads, and stores it.
fn finish(number: u32, row: u32, split: u32, thread: u32, own: vec4<f32>, own_total: f32, top: f32) {
    if (number >= GROUP) {
        return;
    }
    let column = thread % HEAD;
    workgroupBarrier();
    sums[thread] = own;
    totals[thread] = own_total;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) { totals[thread] += totals[thread + half]; }
    }
    workgroupBarrier();
    if (thread >= HEAD) {
        return;
    }
    var sum = own;
    for (var i = 1u; i < WORKGROUP / HEAD; i++) {
        sum += sums[i * HEAD + column];
    }
    let total = totals[0];
    if (params.splits == 1u) {
        out[(row + number) * HEAD + column] = sum / total;
        return;
    }
    let part = (split * params.tokens * params.heads + row + number) * (HEAD + 1u);
    parts[part + column] = sum;
    if (column == 0u) {
        parts[part + HEAD] = vec4(top, total, 0.0, 0.0);
    }
}

@compute @workgroup_size(WORKGROUP)
fn attend(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let units = params.tokens * params.heads / GROUP;
    let group = id.x + id.y * grid.x;
    if (group >= units * params.splits) {
        return;
    }
    let row = group % units * GROUP;        // the first of the token's heads
    let kv_head = row % params.heads / (params.heads / params.kv_heads);
    let split = group / units;
    let seen = params.past + row / params.heads + 1u;    // keys up to the token itself
    let end = min(seen, params.first + (split + 1u) * params.run);
    let start = max(seen - min(seen, params.window), params.first + split * params.run);
    for (var column = thread; column < GROUP * HEAD; column += WORKGROUP) {
        query[column] = q[row * HEAD + column];
    }
    // For the values, the threads first split the columns. The remaining factor splits the keys.
    let column = thread % HEAD;
    let share = thread / HEAD;
    let shares = WORKGROUP / HEAD;
    var all: Sums;
    var top = Numbers(vec4(LOWEST), vec4(LOWEST));
    var total: Numbers;     // over the keys of the thread
    for (var first = start; first < end; first += KEYS) {
        workgroupBarrier();
        let scores = scores_of(((first + thread) * params.kv_heads + kv_head) * HEAD, first + thread < end);
        let highest = all_highest(scores, top, thread);
        let weight = Numbers(exp(scores.low - highest.low), exp(scores.high - highest.high));
        let shrink = Numbers(exp(top.low - highest.low), exp(top.high - highest.high));
        keep_all(thread, weight);
        total = Numbers(total.low * shrink.low + weight.low, total.high * shrink.high + weight.high);
        top = highest;
        workgroupBarrier();
        all = shrunk(all, shrink);
        let count = min(KEYS, end - first);
        for (var i = share; i < count && share < shares; i += shares) {
            all = add_value(all, i, v[((first + i) * params.kv_heads + kv_head) * HEAD + column]);
        }
    }
    finish(0u, row, split, thread, all.s0, total.low.x, top.low.x);
    finish(1u, row, split, thread, all.s1, total.low.y, top.low.y);
    finish(2u, row, split, thread, all.s2, total.low.z, top.low.z);
    finish(3u, row, split, thread, all.s3, total.low.w, top.low.w);
    finish(4u, row, split, thread, all.s4, total.high.x, top.high.x);
    finish(5u, row, split, thread, all.s5, total.high.y, top.high.y);
    finish(6u, row, split, thread, all.s6, total.high.z, top.high.z);
    finish(7u, row, split, thread, all.s7, total.high.w, top.high.w);
}

// A thread has one vec4 of the output. A run without keys of the token has LOWEST and sums of 0.
// The run with the key of the token itself is never empty.
@compute @workgroup_size(WORKGROUP)
fn combine(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let rows = params.tokens * params.heads;
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i >= rows * HEAD) {
        return;
    }
    let row = i / HEAD;
    var top = LOWEST;
    for (var split = 0u; split < params.splits; split++) {
        top = max(top, parts[(split * rows + row) * (HEAD + 1u) + HEAD].x);
    }
    var sum = vec4<f32>();
    var total = 0.0;
    for (var split = 0u; split < params.splits; split++) {
        let part = (split * rows + row) * (HEAD + 1u);
        let weight = exp(parts[part + HEAD].x - top);
        sum += weight * parts[part + i % HEAD];
        total += weight * parts[part + HEAD].y;
    }
    out[i] = sum / total;
}
