// Attention of new tokens over a KV cache ("flash-decoding"). A workgroup takes GROUP query heads
// of one token, which share a key head, and a run of the keys, with an online softmax. `combine`
// joins the runs. This file is combined with a file for the inputs, which has `k`, `v`,
// `fill_query`, `key_of` and `value_of`. Runs unchecked: `ops::cached_attention` proves on the host
// that every index is in its tensor.
//
// The loads of keys and values have no branch around them, so that many are under way at the same
// time: they read the last row of the run in place of rows past it, and the sums skip these.

struct Params {
    tokens: u32,     // new tokens
    past: u32,       // earlier tokens in the cache
    heads: u32,      // query heads, a multiple of GROUP * kv_heads
    kv_heads: u32,
    splits: u32,     // runs of keys, at most SPLITS
    run: u32,        // keys of a run, a multiple of KEYS
    scale: f32,      // of the scores
    window: u32,     // size of the attention window, including the token itself
    first: u32,      // first key of any token; runs start there
    // Of joined inputs:
    angles: u32,     // row of the token in the table
    rotated: u32,    // pairs of vec4s of a head that turn: i and i + rotated
    epsilon: f32,    // of norms
}

@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;  // [tokens, heads, HEAD]
@group(0) @binding(4) var<storage, read_write> parts: array<vec4<f32>>;   // [splits, tokens, heads, HEAD + 1]: sums, then the highest score and the total
@group(1) @binding(0) var<uniform> params: Params;

override HEAD: u32 = 32u;       // vec4s of a head, at most WORKGROUP
override GROUP: u32 = 1u;       // at most 8
override QUERY: u32 = 32u;      // GROUP * HEAD, or more
override DOTS: u32 = 128u;      // GROUP * WORKGROUP
override WEIGHTS: u32 = 32u;    // GROUP * KEYS
const WORKGROUP = 128u;
const KEYS = 32u;           // keys per step
const LANES = WORKGROUP / KEYS;     // threads of a key
const SPLITS = 512u;
const LOWEST = -1e38;       // below every score, and far enough from infinity

var<workgroup> query: array<vec4<f32>, QUERY>;
var<workgroup> dots: array<f32, DOTS>;              // [GROUP, KEYS, LANES]: parts of scores
var<workgroup> scores: array<f32, WEIGHTS>;         // [GROUP, KEYS]
var<workgroup> weights: array<f32, WEIGHTS>;        // [GROUP, KEYS]
var<workgroup> tops: array<f32, 8>;                 // of each head: the highest score so far
var<workgroup> shrinks: array<f32, 8>;              // the factor of earlier sums
var<workgroup> sums: array<vec4<f32>, WORKGROUP>;
var<workgroup> totals: array<f32, WORKGROUP>;

// A number for each query head of the group.
struct Numbers {
    low: vec4<f32>,
    high: vec4<f32>,
}

fn keep_dot(number: u32, thread: u32, value: f32) {
    if (number < GROUP) {
        dots[number * WORKGROUP + thread] = value;
    }
}

// vec4s that a thread has loaded before it needs them.
const AHEAD = 8u;

struct Ahead {
    v0: vec4<f32>,
    v1: vec4<f32>,
    v2: vec4<f32>,
    v3: vec4<f32>,
    v4: vec4<f32>,
    v5: vec4<f32>,
    v6: vec4<f32>,
    v7: vec4<f32>,
}

// The vec4 of a key that a thread multiplies in a round. Threads of a key read neighbours.
fn key_column(round: u32, thread: u32) -> u32 {
    return round * LANES + thread % LANES;
}

fn stored_key(number: u32, kv_head: u32, round: u32, thread: u32) -> vec4<f32> {
    // All threads skip a round without columns.
    if (round * LANES >= HEAD) {
        return vec4<f32>();
    }
    return k[(number * params.kv_heads + kv_head) * HEAD + min(key_column(round, thread), HEAD - 1u)];
}

fn load_keys(number: u32, kv_head: u32, thread: u32) -> Ahead {
    return Ahead(
        stored_key(number, kv_head, 0u, thread),
        stored_key(number, kv_head, 1u, thread),
        stored_key(number, kv_head, 2u, thread),
        stored_key(number, kv_head, 3u, thread),
        stored_key(number, kv_head, 4u, thread),
        stored_key(number, kv_head, 5u, thread),
        stored_key(number, kv_head, 6u, thread),
        stored_key(number, kv_head, 7u, thread),
    );
}

// Adds the products of a vec4 of a key with the query of each head.
fn multiply_key(sums: Numbers, number: u32, round: u32, thread: u32, stored: vec4<f32>) -> Numbers {
    let column = key_column(round, thread);
    if (round * LANES >= HEAD || column >= HEAD) {
        return sums;
    }
    let key = key_of(number, column, stored);
    var s = sums;
    s.low.x += dot(query[column], key);
    if (GROUP > 1u) { s.low.y += dot(query[HEAD + column], key); }
    if (GROUP > 2u) { s.low.z += dot(query[2u * HEAD + column], key); }
    if (GROUP > 3u) { s.low.w += dot(query[3u * HEAD + column], key); }
    if (GROUP > 4u) { s.high.x += dot(query[4u * HEAD + column], key); }
    if (GROUP > 5u) { s.high.y += dot(query[5u * HEAD + column], key); }
    if (GROUP > 6u) { s.high.z += dot(query[6u * HEAD + column], key); }
    if (GROUP > 7u) { s.high.w += dot(query[7u * HEAD + column], key); }
    return s;
}

// The dot products of the key of a thread with the query of each head, over a LANES-th of the
// columns.
fn multiply_keys(number: u32, kv_head: u32, thread: u32, ahead: Ahead) {
    var sums = Numbers();
    sums = multiply_key(sums, number, 0u, thread, ahead.v0);
    sums = multiply_key(sums, number, 1u, thread, ahead.v1);
    sums = multiply_key(sums, number, 2u, thread, ahead.v2);
    sums = multiply_key(sums, number, 3u, thread, ahead.v3);
    sums = multiply_key(sums, number, 4u, thread, ahead.v4);
    sums = multiply_key(sums, number, 5u, thread, ahead.v5);
    sums = multiply_key(sums, number, 6u, thread, ahead.v6);
    sums = multiply_key(sums, number, 7u, thread, ahead.v7);
    for (var round = AHEAD; round * LANES < HEAD; round++) {
        sums = multiply_key(sums, number, round, thread, stored_key(number, kv_head, round, thread));
    }
    keep_dot(0u, thread, sums.low.x);
    keep_dot(1u, thread, sums.low.y);
    keep_dot(2u, thread, sums.low.z);
    keep_dot(3u, thread, sums.low.w);
    keep_dot(4u, thread, sums.high.x);
    keep_dot(5u, thread, sums.high.y);
    keep_dot(6u, thread, sums.high.z);
    keep_dot(7u, thread, sums.high.w);
}

// From dot products to `weights`, `tops` and `shrinks`. The step has `count` keys. `own` has the
// highest scores so far of the heads for which the thread has a weight. All threads of a head find
// the same.
fn weigh(own: vec2<f32>, count: u32, thread: u32) -> vec2<f32> {
    for (var i = thread; i < GROUP * KEYS; i += WORKGROUP) {
        let at = i * LANES;
        let score = params.scale * (dots[at] + dots[at + 1u] + dots[at + 2u] + dots[at + 3u]);
        scores[i] = select(LOWEST, score, i % KEYS < count);
    }
    workgroupBarrier();
    let first = weigh_one(own.x, thread);
    let second = weigh_one(own.y, thread + WORKGROUP);
    workgroupBarrier();
    return vec2(first, second);
}

// Weighs a score. Returns the highest score of its head.
fn weigh_one(before: f32, i: u32) -> f32 {
    if (i >= GROUP * KEYS) {
        return before;
    }
    let head = i / KEYS;
    var top = before;
    for (var j = 0u; j < KEYS; j++) {
        top = max(top, scores[head * KEYS + j]);
    }
    weights[i] = exp(scores[i] - top);
    if (i % KEYS == 0u) {
        tops[head] = top;
        shrinks[head] = exp(before - top);
    }
    return top;
}

// Sums of weighted values of a column, for each head, and of the weights.
struct Sums {
    s0: vec4<f32>,
    s1: vec4<f32>,
    s2: vec4<f32>,
    s3: vec4<f32>,
    s4: vec4<f32>,
    s5: vec4<f32>,
    s6: vec4<f32>,
    s7: vec4<f32>,
    total: Numbers,
}

fn shrunk(sums: Sums) -> Sums {
    let low = vec4(shrinks[0], shrinks[1], shrinks[2], shrinks[3]);
    let high = vec4(shrinks[4], shrinks[5], shrinks[6], shrinks[7]);
    return Sums(
        sums.s0 * low.x,
        sums.s1 * low.y,
        sums.s2 * low.z,
        sums.s3 * low.w,
        sums.s4 * high.x,
        sums.s5 * high.y,
        sums.s6 * high.z,
        sums.s7 * high.w,
        Numbers(sums.total.low * low, sums.total.high * high),
    );
}

fn weight_of(number: u32, i: u32) -> f32 {
    if (number >= GROUP) {
        return 0.0;
    }
    return weights[number * KEYS + i];
}

// Which value of a step a thread adds in a round. For the values, the threads first split the
// columns. The remaining factor splits the keys.
fn value_number(round: u32, thread: u32) -> u32 {
    return thread / HEAD + round * (WORKGROUP / HEAD);
}

// The stored value of a key of the step that starts at `first`, or of the last key before `end`.
fn stored_value(first: u32, end: u32, kv_head: u32, round: u32, thread: u32) -> vec4<f32> {
    // All threads skip a round without keys.
    if (round * (WORKGROUP / HEAD) >= KEYS) {
        return vec4<f32>();
    }
    let number = min(first + value_number(round, thread), end - 1u);
    return v[(number * params.kv_heads + kv_head) * HEAD + thread % HEAD];
}

fn load_values(first: u32, end: u32, kv_head: u32, thread: u32) -> Ahead {
    return Ahead(
        stored_value(first, end, kv_head, 0u, thread),
        stored_value(first, end, kv_head, 1u, thread),
        stored_value(first, end, kv_head, 2u, thread),
        stored_value(first, end, kv_head, 3u, thread),
        stored_value(first, end, kv_head, 4u, thread),
        stored_value(first, end, kv_head, 5u, thread),
        stored_value(first, end, kv_head, 6u, thread),
        stored_value(first, end, kv_head, 7u, thread),
    );
}

// Adds the values of key `i` of the step.
fn add_value(sums: Sums, i: u32, value: vec4<f32>) -> Sums {
    let low = vec4(weight_of(0u, i), weight_of(1u, i), weight_of(2u, i), weight_of(3u, i));
    let high = vec4(weight_of(4u, i), weight_of(5u, i), weight_of(6u, i), weight_of(7u, i));
    var s = sums;
    s.s0 += low.x * value;
    if (GROUP > 1u) { s.s1 += low.y * value; }
    if (GROUP > 2u) { s.s2 += low.z * value; }
    if (GROUP > 3u) { s.s3 += low.w * value; }
    if (GROUP > 4u) { s.s4 += high.x * value; }
    if (GROUP > 5u) { s.s5 += high.y * value; }
    if (GROUP > 6u) { s.s6 += high.z * value; }
    if (GROUP > 7u) { s.s7 += high.w * value; }
    s.total = Numbers(s.total.low + low, s.total.high + high);
    return s;
}

// Adds the value of a round, if the step has it. Threads past the last whole share add values that
// nothing reads.
fn add_round(sums: Sums, first: u32, end: u32, round: u32, thread: u32, stored: vec4<f32>) -> Sums {
    let i = value_number(round, thread);
    if (round * (WORKGROUP / HEAD) >= KEYS || i >= min(KEYS, end - first)) {
        return sums;
    }
    return add_value(sums, i, value_of(first + i, stored));
}

fn add_values(sums: Sums, first: u32, end: u32, kv_head: u32, thread: u32, ahead: Ahead) -> Sums {
    var s = sums;
    s = add_round(s, first, end, 0u, thread, ahead.v0);
    s = add_round(s, first, end, 1u, thread, ahead.v1);
    s = add_round(s, first, end, 2u, thread, ahead.v2);
    s = add_round(s, first, end, 3u, thread, ahead.v3);
    s = add_round(s, first, end, 4u, thread, ahead.v4);
    s = add_round(s, first, end, 5u, thread, ahead.v5);
    s = add_round(s, first, end, 6u, thread, ahead.v6);
    s = add_round(s, first, end, 7u, thread, ahead.v7);
    for (var round = AHEAD; round * (WORKGROUP / HEAD) < KEYS; round++) {
        s = add_round(s, first, end, round, thread, stored_value(first, end, kv_head, round, thread));
    }
    return s;
}

// Adds up a column over the threads that share it: its sum, and the total of the weights. The first
// HEAD threads have the result.
fn add_shares(thread: u32, own: vec4<f32>, own_total: f32) -> vec4<f32> {
    workgroupBarrier();
    sums[thread] = own;
    totals[thread] = own_total;
    workgroupBarrier();
    if (thread >= HEAD) {
        return own;
    }
    var sum = own;
    var total = own_total;
    for (var i = 1u; i < WORKGROUP / HEAD; i++) {
        sum += sums[i * HEAD + thread];
        total += totals[i * HEAD + thread];
    }
    totals[thread] = total;
    return sum;
}

// Adds up a head over the threads, and stores it.
fn finish(number: u32, row: u32, split: u32, thread: u32, own: vec4<f32>, own_total: f32) {
    if (number >= GROUP) {
        return;
    }
    let sum = add_shares(thread, own, own_total);
    if (thread >= HEAD) {
        return;
    }
    let total = totals[thread];
    if (params.splits == 1u) {
        out[(row + number) * HEAD + thread] = sum / total;
        return;
    }
    let part = (split * params.tokens * params.heads + row + number) * (HEAD + 1u);
    parts[part + thread] = sum;
    if (thread == 0u) {
        parts[part + HEAD] = vec4(tops[number], total, 0.0, 0.0);
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
    // A run without keys of the token loads the first row.
    let last = max(end, 1u);
    var keys = load_keys(min(start + thread / LANES, last - 1u), kv_head, thread);
    var values = load_values(start, last, kv_head, thread);
    fill_query(row, kv_head, thread, split + 1u == params.splits);
    if (thread < 8u) {
        tops[thread] = LOWEST;
        shrinks[thread] = 0.0;
    }
    workgroupBarrier();
    var all: Sums;
    var top = vec2(LOWEST);
    for (var first = start; first < end; first += KEYS) {
        multiply_keys(min(first + thread / LANES, end - 1u), kv_head, thread, keys);
        // The loads of the next step are under way during this one.
        let next = first + KEYS;
        if (next < end) { keys = load_keys(min(next + thread / LANES, end - 1u), kv_head, thread); }
        workgroupBarrier();
        top = weigh(top, min(KEYS, end - first), thread);
        all = shrunk(all);
        all = add_values(all, first, end, kv_head, thread, values);
        if (next < end) { values = load_values(next, end, kv_head, thread); }
    }
    finish(0u, row, split, thread, all.s0, all.total.low.x);
    finish(1u, row, split, thread, all.s1, all.total.low.y);
    finish(2u, row, split, thread, all.s2, all.total.low.z);
    finish(3u, row, split, thread, all.s3, all.total.low.w);
    finish(4u, row, split, thread, all.s4, all.total.high.x);
    finish(5u, row, split, thread, all.s5, all.total.high.y);
    finish(6u, row, split, thread, all.s6, all.total.high.z);
    finish(7u, row, split, thread, all.s7, all.total.high.w);
}

var<workgroup> factors: array<f32, SPLITS>;     // of each run; at first its highest score
var<workgroup> run_totals: array<f32, SPLITS>;

// A workgroup takes a head of a token. A run without keys of the token has LOWEST and sums of 0.
// The run with the key of the token itself is never empty.
@compute @workgroup_size(WORKGROUP)
fn combine(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let rows = params.tokens * params.heads;
    let row = id.x + id.y * grid.x;
    if (row >= rows) {
        return;
    }
    let stride = rows * (HEAD + 1u);
    let part = row * (HEAD + 1u);
    for (var split = thread; split < params.splits; split += WORKGROUP) {
        let numbers = parts[split * stride + part + HEAD];
        factors[split] = numbers.x;
        run_totals[split] = numbers.y;
    }
    workgroupBarrier();
    var top = LOWEST;
    for (var split = 0u; split < params.splits; split++) {
        top = max(top, factors[split]);
    }
    workgroupBarrier();
    for (var split = thread; split < params.splits; split += WORKGROUP) {
        factors[split] = exp(factors[split] - top);
    }
    workgroupBarrier();
    let column = thread % HEAD;
    let share = thread / HEAD;
    let shares = WORKGROUP / HEAD;
    var own = vec4<f32>();
    var own_total = 0.0;
    for (var split = share; split < params.splits && share < shares; split += shares) {
        let at = split * stride + part;
        own += factors[split] * parts[at + column];
        own_total += factors[split] * run_totals[split];
    }
    let sum = add_shares(thread, own, own_total);
    if (thread < HEAD) {
        out[row * HEAD + thread] = sum / totals[thread];
    }
}
