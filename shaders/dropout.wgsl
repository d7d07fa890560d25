// y = x / (1 - p) for a kept element, else 0. A hash of key and index decides which elements are
// kept. Runs unchecked: the host proves that both bindings hold `count` floats.

struct Params {
    count: u32,
    first: u32,         // index of the first element in the whole matrix
    key: vec2<u32>,
    threshold: u32,     // p * 2^32: elements with smaller hashes are dropped
    scale: f32,         // 1 / (1 - p)
    add: u32,           // 1 to add to y
    pad: u32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;

// A permutation of 32 bits: every bit of the input affects every bit of the output (C. Wellons,
// "lowbias32").
fn mix(value: u32) -> u32 {
    var x = value;
    x = (x ^ (x >> 16u)) * 0x21f0aaadu;
    x = (x ^ (x >> 15u)) * 0xd35a2d97u;
    return x ^ (x >> 15u);
}

fn hash(i: u32) -> u32 {
    return mix(mix(i ^ params.key.x) + params.key.y);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i < params.count) {
        let kept = select(0.0, x[i] * params.scale, hash(params.first + i) >= params.threshold);
        if (params.add != 0u) { y[i] += kept; } else { y[i] = kept; }
    }
}
