// A copy at memory speed: the baseline of the dequant kernels. Runs unchecked: the host proves that
// both bindings hold `count` vec4s.

struct Params {
    count: u32,     // vec4s to copy
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

@group(0) @binding(0) var<storage, read> from_: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> to: array<vec4<u32>>;
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;

// One vec4 per thread: more are slower.
@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i < params.count) { to[i] = from_[i]; }
}
