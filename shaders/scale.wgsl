// x = x * factor + offset, in place. Runs unchecked: the host proves that the binding holds `count`
// floats.

struct Params {
    count: u32,
    factor: f32,
    offset: f32,
    pad: u32,
}

@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i < params.count) { x[i] = x[i] * params.factor + params.offset; }
}
