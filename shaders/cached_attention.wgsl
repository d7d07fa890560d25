// Attention of new tokens over a KV cache ("flash-decoding"). A workgroup takes one head of one
// token and a run of the keys, with an online softmax. `combine` joins the runs. Runs unchecked:
// `ops::cached_attention` proves on the host that every index is in its tensor.

struct Params {
    tokens: u32,     // new tokens
    past: u32,       // earlier tokens in the cache
    heads: u32,      // query heads, a multiple of kv_heads
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

override HEAD: u32 = 32u;   // vec4s of a head, at most WORKGROUP
const WORKGROUP = 128u;
const KEYS = WORKGROUP;     // keys per step
const LANES = 8u;           // threads that share a key
const STRIDE = LANES + 1u;  // odd, so that adjacent keys are in different banks
const LOWEST = -1e38;       // below every score, and far enough from infinity

var<workgroup> query: array<vec4<f32>, HEAD>;
var<workgroup> products: array<f32, KEYS * STRIDE>;
var<workgroup> weights: array<f32, KEYS>;           // or scores
var<workgroup> highs: array<f32, KEYS / LANES>;     // highest of LANES scores each
var<workgroup> sums: array<vec4<f32>, WORKGROUP>;
var<workgroup> totals: array<f32, WORKGROUP>;

// The index of the first vec4 of a head in the keys or values of a token.
fn row_of(key: u32, head: u32) -> u32 {
    return (key * params.kv_heads + head / (params.heads / params.kv_heads)) * HEAD;
}

// The score of key `first + thread`, or LOWEST from `end` on.
fn score_of(first: u32, end: u32, head: u32, thread: u32) -> f32 {
    for (var i = thread / LANES; i < KEYS; i += WORKGROUP / LANES) {
        var product = 0.0;
        if (first + i < end) {
            let row = row_of(first + i, head);
            for (var column = thread % LANES; column < HEAD; column += LANES) {
                product += dot(query[column], k[row + column]);
            }
        }
        products[i * STRIDE + thread % LANES] = product;
    }
    workgroupBarrier();
    var score = 0.0;
    for (var lane = 0u; lane < LANES; lane++) {
        score += products[thread * STRIDE + lane];
    }
    return select(LOWEST, score * params.scale, first + thread < end);
}

// The maximum of `top` and the scores of all threads.
fn highest_of(score: f32, top: f32, thread: u32) -> f32 {
    weights[thread] = score;
    workgroupBarrier();
    if (thread < KEYS / LANES) {
        var high = weights[thread * LANES];
        for (var i = 1u; i < LANES; i++) {
            high = max(high, weights[thread * LANES + i]);
        }
        highs[thread] = high;
    }
    workgroupBarrier();
    var highest = top;
    for (var i = 0u; i < KEYS / LANES; i++) {
        highest = max(highest, highs[i]);
    }
    return highest;
}

@compute @workgroup_size(WORKGROUP)
fn attend(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let rows = params.tokens * params.heads;
    let group = id.x + id.y * grid.x;
    if (group >= rows * params.splits) {
        return;
    }
    let row = group % rows;
    let head = row % params.heads;
    let split = group / rows;
    let seen = params.past + row / params.heads + 1u;    // keys up to the token itself
    let end = min(seen, params.first + (split + 1u) * params.run);
    let start = max(seen - min(seen, params.window), params.first + split * params.run);
    for (var column = thread; column < HEAD; column += WORKGROUP) {
        query[column] = q[row * HEAD + column];
    }
    // For the values, the threads first split the columns. The remaining factor splits the keys.
    let column = thread % HEAD;
    let share = thread / HEAD;
    let shares = WORKGROUP / HEAD;
    var sum = vec4<f32>();
    var top = LOWEST;
    var total = 0.0;    // over the keys of the thread
    for (var first = start; first < end; first += KEYS) {
        workgroupBarrier();
        let score = score_of(first, end, head, thread);
        let highest = highest_of(score, top, thread);
        let weight = exp(score - highest);
        let shrink = exp(top - highest);
        weights[thread] = weight;
        total = total * shrink + weight;
        top = highest;
        workgroupBarrier();
        sum *= shrink;
        let count = min(KEYS, end - first);
        for (var i = share; i < count && share < shares; i += shares) {
            sum += weights[i] * v[row_of(first + i, head) + column];
        }
    }
    sums[thread] = sum;
    totals[thread] = total;
    workgroupBarrier();
    if (share > 0u) {
        return;
    }
    for (var i = 1u; i < shares; i++) {
        sum += sums[i * HEAD + column];
    }
    total = 0.0;
    for (var i = 0u; i < WORKGROUP; i++) {
        total += totals[i];
    }
    if (params.splits == 1u) {
        out[row * HEAD + column] = sum / total;
        return;
    }
    parts[group * (HEAD + 1u) + column] = sum;
    if (column == 0u) {
        parts[group * (HEAD + 1u) + HEAD] = vec4(top, total, 0.0, 0.0);
    }
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
