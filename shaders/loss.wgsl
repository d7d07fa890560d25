// Cross-entropy over logits that come in chunks of the vocabulary. Runs unchecked: the host has proven that `logits` holds
// `tokens * width` floats, `labels` and `state` one element a token, and `total` one float.

struct Params {
    tokens: u32,
    width: u32,     // vocabulary rows in this chunk
    first: u32,     // the first of them
    scale: f32,     // 1 / number of trained tokens
    nan: u32,       // bits of NaN, which WGSL has no constant for
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

// What a token has so far. No chunk was seen, or the token is not trained, where `sum` is 0.
struct State {
    largest: f32,   // logit
    sum: f32,       // of exp(logit - largest)
    target_: f32,   // logit of the label; NaN until its chunk has come
    loss: f32,
}

@group(0) @binding(0) var<storage, read> labels: array<u32>;            // [tokens]
@group(0) @binding(1) var<storage, read_write> state: array<State>;     // [tokens]
@group(0) @binding(2) var<storage, read> logits: array<f32>;            // [tokens, width]
@group(0) @binding(3) var<storage, read_write> gradient_: array<f32>;   // [tokens, width]: logits, then their gradient
@group(0) @binding(4) var<storage, read_write> total: array<f32>;       // [1]
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;
const IGNORE_INDEX = 0xffffffffu;
const LOWEST = -3.4028234e38;

var<workgroup> partial: array<f32, WORKGROUP>;

// Tests bits, and gives NaN itself where there is one: drivers may take `x - x` for 0, and compute a finite exp(NaN).
fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

fn exp_below(logit: f32, largest: f32) -> f32 {
    return select(bitcast<f32>(params.nan), exp(logit - largest), is_finite(logit));
}

// The sum over the threads, always in the same order.
fn group_sum(thread: u32, value: f32) -> f32 {
    workgroupBarrier();
    partial[thread] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (thread < half) { partial[thread] += partial[thread + half]; }
        workgroupBarrier();
    }
    return partial[0];
}

fn group_max(thread: u32, value: f32) -> f32 {
    partial[thread] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (thread < half) { partial[thread] = max(partial[thread], partial[thread + half]); }
        workgroupBarrier();
    }
    return partial[0];
}

// A workgroup a token: takes this chunk into the token's state.
@compute @workgroup_size(WORKGROUP)
fn accumulate(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = id.x + id.y * grid.x;
    if (token >= params.tokens) { return; }
    let label = labels[token];
    let start = token * params.width;
    let width = select(params.width, 0u, label == IGNORE_INDEX);
    var before = State(LOWEST, 0.0, bitcast<f32>(params.nan), 0.0);
    if (params.first > 0u) { before = state[token]; }
    var largest = before.largest;
    for (var i = thread; i < width; i += WORKGROUP) { largest = max(largest, logits[start + i]); }
    largest = group_max(thread, largest);
    var sum = 0.0;
    for (var i = thread; i < width; i += WORKGROUP) { sum += exp_below(logits[start + i], largest); }
    sum = group_sum(thread, sum);
    if (thread == 0u) {
        var after = before;
        after.largest = largest;
        after.sum = before.sum * exp(before.largest - largest) + sum;
        let i = label - params.first;
        if (label >= params.first && i < width) { after.target_ = logits[start + i]; }
        state[token] = after;
    }
}

// One workgroup: the loss of each token, and their sum.
@compute @workgroup_size(WORKGROUP)
fn finish(@builtin(local_invocation_index) thread: u32) {
    var sum = 0.0;
    for (var i = thread; i < params.tokens; i += WORKGROUP) {
        let token = state[i];
        var loss = 0.0;
        if (!is_finite(token.sum)) {
            loss = bitcast<f32>(params.nan);
        } else if (token.sum > 0.0) {
            loss = log(token.sum) + (token.largest - token.target_);
        }
        state[i].loss = loss;
        sum += loss;
    }
    sum = group_sum(thread, sum);
    if (thread == 0u) { total[0] += sum * params.scale; }
}

// A workgroup a token: (softmax - onehot) / number of trained tokens, in place of the logits.
@compute @workgroup_size(WORKGROUP)
fn gradient(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = id.x + id.y * grid.x;
    if (token >= params.tokens) { return; }
    let label = labels[token];
    let start = token * params.width;
    let largest = state[token].largest;
    let sum = state[token].sum;
    for (var i = thread; i < params.width; i += WORKGROUP) {
        var slope = 0.0;
        if (label != IGNORE_INDEX) {
            let hot = select(0.0, 1.0, params.first + i == label);
            slope = (exp_below(gradient_[start + i], largest) / sum - hot) * params.scale;
        }
        gradient_[start + i] = slope;
    }
}
