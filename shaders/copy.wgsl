// A copy at the speed of memory: the yardstick of the dequant kernels. Runs unchecked: the host has proven that both bindings hold
// `count` vec4s.

struct Params {
    count: u32,     // vec4s to copy
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

@group(0) @binding(0) var<storage, read> from_: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> to: array<vec4<u32>>;
@group(1) @binding(0) var<uniform> params: Params;

override WORKGROUP: u32 = 256u;
override ITEMS: u32 = 4u;   // vec4s that a thread copies, WORKGROUP apart

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = id.x + id.y * grid.x;
    let first = group * (WORKGROUP * ITEMS) + thread;
    let end = (group + 1u) * (WORKGROUP * ITEMS);
    if (end <= params.count) {
        for (var k = 0u; k < ITEMS; k++) { to[first + k * WORKGROUP] = from_[first + k * WORKGROUP]; }
    } else {
        for (var i = first; i < min(params.count, end); i += WORKGROUP) { to[i] = from_[i]; }
    }
}
