// A copy at memory speed, by vectors or by words. Runs unchecked: the host proves that both
// bindings hold `count` of them.

struct Params {
    count: u32,     // vectors or words to copy
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

@group(0) @binding(0) var<storage, read> from_vectors: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> to_vectors: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> from_words: array<u32>;
@group(0) @binding(3) var<storage, read_write> to_words: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;

// One vector per thread: more are slower.
@compute @workgroup_size(WORKGROUP)
fn vectors(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i < params.count) { to_vectors[i] = from_vectors[i]; }
}

@compute @workgroup_size(WORKGROUP)
fn words(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i < params.count) { to_words[i] = from_words[i]; }
}
