// h = f(gate) * up and its gradients, element by element: f(x) = x * sigmoid(z(x)). It is combined
// with glu_function.wgsl. Runs unchecked: the host proves that all bindings hold `count` floats.

struct Params {
    count: u32,
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

@group(0) @binding(0) var<storage, read_write> gate: array<f32>;   // backward: overwritten by its gradient
@group(0) @binding(1) var<storage, read_write> up: array<f32>;     // backward: overwritten by its gradient
@group(0) @binding(2) var<storage, read> dh: array<f32>;
@group(0) @binding(3) var<storage, read_write> h: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i < params.count) { h[i] = gate[i] * sigmoids(argument(gate[i]).x).x * up[i]; }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i < params.count) {
        let x = gate[i];
        let z = argument(x);
        let s = sigmoids(z.x);
        gate[i] = dh[i] * up[i] * s.x * (1.0 + x * s.y * z.y);
        up[i] = dh[i] * x * s.x;
    }
}
