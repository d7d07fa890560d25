// From the joined products of q, k and v of new tokens to rotated queries, and to keys and values
// in their places in a KV cache. A workgroup takes one head of one token. Runs unchecked:
// `ops::split_heads` proves on the host that every index is in its tensor.

struct Params {
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    half: u32,          // half of a head
    past: u32,          // row of the first token in keys and values
    first: u32,         // row of the first token in the table
    rotated: u32,       // pairs of a head that turn: i and i + rotated
    epsilon: f32,       // NORM
}

@group(0) @binding(0) var<storage, read> joined: array<f32>;            // [tokens, heads + 2 kv_heads, 2 half]
@group(0) @binding(1) var<storage, read> query_gamma: array<f32>;       // NORM: [2 half]
@group(0) @binding(2) var<storage, read> key_gamma: array<f32>;
@group(0) @binding(3) var<storage, read> table: array<vec2<f32>>;       // [.., rotated]: cosine, sine
@group(0) @binding(4) var<storage, read_write> queries: array<f32>;     // [tokens, heads, 2 half]
@group(0) @binding(5) var<storage, read_write> keys: array<f32>;        // [past + tokens, kv_heads, 2 half]
@group(0) @binding(6) var<storage, read_write> values: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 64u;
override NORM: bool = false;

var<workgroup> partial: array<f32, WORKGROUP>;

// The factor of the RMS norm of a head.
fn norm_of(start: u32, thread: u32) -> f32 {
    var squares = 0.0;
    for (var i = thread; i < 2u * params.half; i += WORKGROUP) {
        squares += joined[start + i] * joined[start + i];
    }
    partial[thread] = squares;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) { partial[thread] += partial[thread + half]; }
    }
    workgroupBarrier();
    return inverseSqrt(partial[0] / f32(2u * params.half) + params.epsilon);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let all = params.heads + 2u * params.kv_heads;
    let group = id.x + id.y * grid.x;
    if (group >= params.tokens * all) {
        return;
    }
    let token = group / all;
    let head = group % all;
    let half = params.half;
    let size = 2u * half;
    let start = group * size;
    let row = (params.past + token) * params.kv_heads;
    if (head >= params.heads + params.kv_heads) {
        let to = (row + head - params.heads - params.kv_heads) * size;
        for (var i = thread; i < size; i += WORKGROUP) { values[to + i] = joined[start + i]; }
        return;
    }
    let is_query = head < params.heads;
    var factor = 1.0;
    if (NORM) {
        factor = norm_of(start, thread);
    }
    let rotated_pairs = params.rotated;
    for (var pair = thread; pair < half; pair += WORKGROUP) {
        // The first pairs turn. Those after them are the elements that stay.
        let turns = pair < rotated_pairs;
        let i = pair + select(rotated_pairs, 0u, turns);
        let j = pair + select(half, rotated_pairs, turns);
        var a = joined[start + i];
        var b = joined[start + j];
        if (NORM) {
            if (is_query) {
                a *= factor * query_gamma[i];
                b *= factor * query_gamma[j];
            } else {
                a *= factor * key_gamma[i];
                b *= factor * key_gamma[j];
            }
        }
        var turn = vec2(1.0, 0.0);
        if (turns) {
            turn = table[(params.first + token) * rotated_pairs + pair];
        }
        let rotated = vec2(a * turn.x - b * turn.y, b * turn.x + a * turn.y);
        if (is_query) {
            let to = (token * params.heads + head) * size;
            queries[to + i] = rotated.x;
            queries[to + j] = rotated.y;
        } else {
            let to = (row + head - params.heads) * size;
            keys[to + i] = rotated.x;
            keys[to + j] = rotated.y;
        }
    }
}
