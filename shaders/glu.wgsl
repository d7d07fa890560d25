// h = f(gate) * up and its gradients, element by element: f(x) = x * sigmoid(z(x)). Runs unchecked:
// the host proves that all bindings hold `count` floats.

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
override GELU: bool = false; // gelu by its approximation with tanh, else silu

// sigmoid(x) and sigmoid(-x). It takes no exponential of a positive number, which could overflow,
// and no difference of close numbers.
fn sigmoids(x: f32) -> vec2<f32> {
    let e = exp(-abs(x));
    let both = vec2(1.0, e) / (1.0 + e);
    return select(both.yx, both, x >= 0.0);
}

// z(x) and its derivative. Of gelu, the sigmoid is 0 or 1 far before the clamp.
fn argument(x: f32) -> vec2<f32> {
    if (!GELU) { return vec2(x, 1.0); }
    let bounded = clamp(x, -100.0, 100.0);
    let square = bounded * bounded;
    return 1.5957691216057308 * vec2(bounded * (1.0 + 0.044715 * square), 1.0 + 0.134145 * square);
}

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
