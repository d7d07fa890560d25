// Rotates each pair (i, i + half) of every head by the angle of the token position. The other
// elements of a head, from 2 * half on, stay. Cosine and sine are in a table. Runs unchecked:
// `ops::rotary` proves on the host that every index is in its tensor.

struct Params {
    pairs: u32,       // total number: tokens * heads * half
    heads: u32,
    half: u32,        // pairs per head
    positions: u32,   // rows of the table
    sign: f32,        // 1, or -1 to rotate back
    first: u32,       // the first token; rotate_from: its position
    head_dim: u32,    // elements of a head
    pad: u32,
}

@group(0) @binding(0) var<storage, read_write> x: array<f32>;       // [tokens, heads, head_dim]
@group(0) @binding(1) var<storage, read> starts: array<u32>;        // first token of the sample of each token, from token 0 on
@group(0) @binding(2) var<storage, read> table: array<vec2<f32>>;   // [positions, half]: cosine, sine
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;

// Rotates a pair by the angle of a position. The table contains the position.
fn turn(pair: u32, position: u32) {
    let i = pair % params.half;
    let turn = table[position * params.half + i] * vec2(1.0, params.sign);
    let at = pair / params.half * params.head_dim + i;
    let a = x[at];
    let b = x[at + params.half];
    x[at] = a * turn.x - b * turn.y;
    x[at + params.half] = b * turn.x + a * turn.y;
}

fn token_of(pair: u32) -> u32 {
    return pair / params.half / params.heads;
}

// For tokens of packed samples.
@compute @workgroup_size(WORKGROUP)
fn rotate(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pair = (group.x + group.y * grid.x) * WORKGROUP + thread;
    if (pair < params.pairs) {
        let token = params.first + token_of(pair);
        // The host does not know the values in `starts`. The clamp keeps every index in the table.
        turn(pair, min(token - starts[token], params.positions - 1u));
    }
}

// For tokens of one sample, from position `first` on.
@compute @workgroup_size(WORKGROUP)
fn rotate_from(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pair = (group.x + group.y * grid.x) * WORKGROUP + thread;
    if (pair < params.pairs) {
        turn(pair, params.first + token_of(pair));
    }
}
