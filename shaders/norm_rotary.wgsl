// The norm of every head (rms_norm.wgsl) and the rotation of its pairs (rotary.wgsl) in one pass,
// and the gradient of both. 32 threads take a head, with the sums of rms_norm.wgsl for narrow rows.
// Runs unchecked: `ops::norm_rotary` proves on the host that every index is in its tensor.

struct Params {
    heads: u32,         // of all tokens
    per_token: u32,     // heads of a token
    head_dim: u32,      // elements of a head
    half: u32,          // pairs of a head that are rotated; elements from 2 * half on are not
    positions: u32,     // rows of the table
    first: u32,         // the first token
    epsilon: f32,
    sign: f32,          // 1, or -1 to rotate back, as in rotary.wgsl
}

@group(0) @binding(0) var<storage, read> x: array<f32>;             // [tokens, heads, head_dim]
@group(0) @binding(1) var<storage, read> gamma: array<f32>;         // [head_dim]
@group(0) @binding(2) var<storage, read> dy: array<f32>;            // as x: of the rotated heads
@group(0) @binding(3) var<storage, read> starts: array<u32>;        // first token of the sample of each token, from token 0 on
@group(0) @binding(4) var<storage, read> table: array<vec2<f32>>;   // [positions, half]: cosine, sine
@group(0) @binding(5) var<storage, read_write> out: array<f32>;     // as x: rotated heads, or dx
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;
const LANES = 32u;

var<workgroup> partial: array<vec2<f32>, WORKGROUP>;

// The sum over the threads of a head, in a fixed order.
fn head_sum(thread: u32, value: vec2<f32>) -> vec2<f32> {
    let lane = thread % LANES;
    partial[thread] = value;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if (lane < half) { partial[thread] += partial[thread + half]; }
        workgroupBarrier();
    }
    return partial[thread - lane];
}

// The row of the table for a head, 0 past the last head.
fn position_of(head: u32) -> u32 {
    if (head >= params.heads) { return 0u; }
    let token = params.first + head / params.per_token;
    // The host does not know the values in `starts`. The clamp keeps every index in the table.
    return min(token - starts[token], params.positions - 1u);
}

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let head = (id.x + id.y * grid.x) * (WORKGROUP / LANES) + thread / LANES;
    let lane = thread % LANES;
    let start = head * params.head_dim;
    // Heads past the end have no elements, but their threads take part in the barriers.
    let width = select(0u, params.head_dim, head < params.heads);
    var squares = 0.0;
    for (var i = lane; i < width; i += LANES) {
        let value = x[start + i];
        squares += value * value;
    }
    let r = inverseSqrt(head_sum(thread, vec2(squares, 0.0)).x / f32(params.head_dim) + params.epsilon);
    let row = position_of(head) * params.half;
    for (var i = lane; i < min(params.half, width); i += LANES) {
        let turn = table[row + i] * vec2(1.0, params.sign);
        let a = x[start + i] * r * gamma[i];
        let b = x[start + i + params.half] * r * gamma[i + params.half];
        out[start + i] = a * turn.x - b * turn.y;
        out[start + i + params.half] = b * turn.x + a * turn.y;
    }
    for (var i = 2u * params.half + lane; i < width; i += LANES) {
        out[start + i] = x[start + i] * r * gamma[i];
    }
}

// Element `i` of the gradient of a head before its rotation.
fn turned_back(start: u32, i: u32, row: u32) -> f32 {
    let value = dy[start + i];
    if (i < params.half) {
        let turn = table[row + i] * vec2(1.0, params.sign);
        return value * turn.x - dy[start + i + params.half] * turn.y;
    }
    if (i < 2u * params.half) {
        let turn = table[row + i - params.half] * vec2(1.0, params.sign);
        return value * turn.x + dy[start + i - params.half] * turn.y;
    }
    return value;
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let head = (id.x + id.y * grid.x) * (WORKGROUP / LANES) + thread / LANES;
    let lane = thread % LANES;
    let start = head * params.head_dim;
    let width = select(0u, params.head_dim, head < params.heads);
    let row = position_of(head) * params.half;
    var sums = vec2(0.0);
    for (var i = lane; i < width; i += LANES) {
        let value = x[start + i];
        sums += vec2(value, turned_back(start, i, row) * gamma[i]) * value;
    }
    let mean = head_sum(thread, sums) / f32(params.head_dim);
    let r = inverseSqrt(mean.x + params.epsilon);
    let along = r * r * mean.y;
    for (var i = lane; i < width; i += LANES) {
        out[start + i] = r * (turned_back(start, i, row) * gamma[i] - along * x[start + i]);
    }
}
