// Cross-entropy over logits in chunks of the vocabulary. Runs unchecked: the host proves that
// `rows` and `changed` hold `tokens * width` floats, `labels` and `state` one element per token,
// and `total` one float.

struct Params {
    tokens: u32,
    width: u32,     // vocabulary rows of this chunk; `rescale`, `gradient`: columns
    first: u32,     // first vocabulary row
    scale: f32,     // 1 / number of tokens with a label
    nan: u32,       // bits of NaN; WGSL has no such constant
    factor: f32,    // of the products with the weight
    pad0: u32,
    pad1: u32,
}

// The state of a token. Its sum leaves the label out.
struct State {
    largest: f32,   // logit
    sum: f32,       // of exp(logit - largest)
    target_: f32,   // logit of the label; NaN before its chunk
    loss: f32,      // before `finish`, the factor of earlier sums since the last chunk
}

@group(0) @binding(0) var<storage, read> labels: array<u32>;            // [tokens]
@group(0) @binding(1) var<storage, read_write> state: array<State>;     // [tokens]
@group(0) @binding(2) var<storage, read> rows: array<f32>;              // [tokens, width]: logits, or rows of labels
@group(0) @binding(3) var<storage, read_write> changed: array<f32>;     // [tokens, width]
@group(0) @binding(4) var<storage, read_write> total: array<f32>;       // [1]
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;
const IGNORE_INDEX = 0xffffffffu;
const LOWEST = -3.4028234e38;

var<workgroup> partial: array<f32, WORKGROUP>;

// Tests the bits and returns NaN explicitly: a driver may fold `x - x` to 0 or compute a finite
// exp(NaN).
fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

fn exp_below(logit: f32, largest: f32) -> f32 {
    return select(bitcast<f32>(params.nan), exp(logit - largest), is_finite(logit));
}

// The sum over the threads, in a fixed order.
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

// The exponential of a logit below the largest one, or 0 for the label.
fn of_other(logit: f32, largest: f32, is_label: bool) -> f32 {
    return select(exp_below(logit, largest), 0.0, is_label);
}

// The state of a token after this chunk.
fn updated(before: State, largest: f32, sum: f32, target_: f32) -> State {
    let factor = exp(before.largest - largest);
    return State(largest, before.sum * factor + sum, target_, factor);
}

// The state of a token before this chunk.
fn state_before(token: u32) -> State {
    if (params.first > 0u) { return state[token]; }
    return State(LOWEST, 0.0, bitcast<f32>(params.nan), 0.0);
}

// One workgroup per token: accumulates this chunk of logits, `rows`, into the state of the token.
@compute @workgroup_size(WORKGROUP)
fn accumulate(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = id.x + id.y * grid.x;
    if (token >= params.tokens) { return; }
    let label = labels[token];
    let start = token * params.width;
    let width = select(params.width, 0u, label == IGNORE_INDEX);
    let before = state_before(token);
    let of_label = label - params.first;
    var target_ = before.target_;
    if (label >= params.first && of_label < width) { target_ = rows[start + of_label]; }
    var largest = before.largest;
    for (var i = thread; i < width; i += WORKGROUP) { largest = max(largest, rows[start + i]); }
    largest = group_max(thread, largest);
    var sum = 0.0;
    for (var i = thread; i < width; i += WORKGROUP) { sum += of_other(rows[start + i], largest, i == of_label); }
    sum = group_sum(thread, sum);
    if (thread == 0u) { state[token] = updated(before, largest, sum, target_); }
}

// As `accumulate`, and replaces the logits, `changed`, with the exponentials of the others: 0 for
// the label, and for a token without one.
@compute @workgroup_size(WORKGROUP)
fn exponentials(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = id.x + id.y * grid.x;
    if (token >= params.tokens) { return; }
    let label = labels[token];
    let start = token * params.width;
    let width = select(params.width, 0u, label == IGNORE_INDEX);
    let before = state_before(token);
    let of_label = label - params.first;
    var target_ = before.target_;
    // The maximum has a barrier before the writes.
    if (label >= params.first && of_label < width) { target_ = changed[start + of_label]; }
    var largest = before.largest;
    for (var i = thread; i < width; i += WORKGROUP) { largest = max(largest, changed[start + i]); }
    largest = group_max(thread, largest);
    var sum = 0.0;
    for (var i = thread; i < width; i += WORKGROUP) {
        let weight = of_other(changed[start + i], largest, i == of_label);
        changed[start + i] = weight;
        sum += weight;
    }
    for (var i = width + thread; i < params.width; i += WORKGROUP) { changed[start + i] = 0.0; }
    sum = group_sum(thread, sum);
    if (thread == 0u) { state[token] = updated(before, largest, sum, target_); }
}

// One workgroup per token: brings sums of earlier chunks, `changed`, to the present largest logit.
@compute @workgroup_size(WORKGROUP)
fn rescale(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = id.x + id.y * grid.x;
    if (token >= params.tokens) { return; }
    let factor = state[token].loss;
    if (factor == 1.0) { return; }
    let start = token * params.width;
    for (var i = thread; i < params.width; i += WORKGROUP) { changed[start + i] *= factor; }
}

// One workgroup: the loss of each token, and their sum.
@compute @workgroup_size(WORKGROUP)
fn finish(@builtin(local_invocation_index) thread: u32) {
    var sum = 0.0;
    for (var i = thread; i < params.tokens; i += WORKGROUP) {
        let token = state[i];
        let all = token.sum + exp_below(token.target_, token.largest);
        var loss = 0.0;
        if (labels[i] != IGNORE_INDEX) {
            loss = select(bitcast<f32>(params.nan), log(all) + (token.largest - token.target_), is_finite(all));
        }
        state[i].loss = loss;
        sum += loss;
    }
    sum = group_sum(thread, sum);
    if (thread == 0u) { total[0] += sum * params.scale; }
}

// One workgroup per token: replaces the sums of exponentials times rows of the weight, `changed`,
// with the gradient of the mean loss. `rows` has the label's row of the weight.
@compute @workgroup_size(WORKGROUP)
fn gradient(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = id.x + id.y * grid.x;
    if (token >= params.tokens) { return; }
    let start = token * params.width;
    if (labels[token] == IGNORE_INDEX) {
        for (var i = thread; i < params.width; i += WORKGROUP) { changed[start + i] = 0.0; }
        return;
    }
    let own = state[token];
    let all = own.sum + exp_below(own.target_, own.largest);
    let scale = params.scale / all;
    // softmax - 1 of the label, from the sum of the others: no difference of almost equal numbers.
    let of_label = scale * own.sum * params.factor;
    for (var i = thread; i < params.width; i += WORKGROUP) {
        changed[start + i] = scale * changed[start + i] - of_label * rows[start + i];
    }
}
