// h = f(gate) * up and its gradients, with gate and up as halves.wgsl stores them. It is combined
// with panels.wgsl, glu_function.wgsl and glu_fours.wgsl. A workgroup takes a row. Runs unchecked:
// the host proves that matrices have `rows * cols` floats, with columns in groups of eight, and
// that stored ones have `rows * fours` times 16 bytes.

struct Params {
    rows: u32,
    cols: u32,
    fours: u32,     // of a stored row
    pad: u32,
}

@group(0) @binding(0) var<storage, read_write> gate: array<vec4<f32>>;         // backward: its gradient
@group(0) @binding(1) var<storage, read_write> up: array<vec4<f32>>;           // backward: its gradient
@group(0) @binding(2) var<storage, read_write> stored_gate: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> stored_up: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> h: array<vec4<f32>>;            // backward: its gradient
@group(1) @binding(0) var<uniform> params: Params;

// Four of the eight stored elements.
fn four_of(eight: vec4<u32>, part: u32, scale: f32) -> vec4<f32> {
    return unpacked(select(eight.xy, eight.zw, part == 1u), scale);
}

// Computes `h`, and stores `gate` and `up`.
@compute @workgroup_size(256)
fn forward_keep(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = id.x + id.y * grid.x;
    if (row >= params.rows) {
        return;
    }
    let start = row * params.cols / 4u;
    var of_gate = 0u;
    var of_up = 0u;
    for (var four = thread; four < params.cols / 4u; four += 256u) {
        let x = gate[start + four];
        let y = up[start + four];
        of_gate = max(of_gate, magnitudes(x));
        of_up = max(of_up, magnitudes(y));
        h[start + four] = activated(x, y);
    }
    of_gate = largest_of(thread, of_gate);
    workgroupBarrier();
    of_up = largest_of(thread, of_up);
    let exponents = vec2(exponent_of(of_gate), exponent_of(of_up));
    let stored = row * params.fours;
    if (thread == 0u) {
        stored_gate[stored] = vec4(bitcast<u32>(exponents.x), 0u, 0u, 0u);
        stored_up[stored] = vec4(bitcast<u32>(exponents.y), 0u, 0u, 0u);
    }
    let scales = vec2(power(-exponents.x), power(-exponents.y));
    for (var eight = thread; eight < params.cols / 8u; eight += 256u) {
        let at = start + 2u * eight;
        stored_gate[stored + 1u + eight] =
            vec4(four_halves(gate[at], scales.x, of_gate), four_halves(gate[at + 1u], scales.x, of_gate));
        stored_up[stored + 1u + eight] =
            vec4(four_halves(up[at], scales.y, of_up), four_halves(up[at + 1u], scales.y, of_up));
    }
}

// Computes `h` from what is stored.
@compute @workgroup_size(256)
fn forward_stored(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = id.x + id.y * grid.x;
    if (row >= params.rows) {
        return;
    }
    let stored = row * params.fours;
    let scales = vec2(power(bitcast<i32>(stored_gate[stored].x)), power(bitcast<i32>(stored_up[stored].x)));
    for (var eight = thread; eight < params.cols / 8u; eight += 256u) {
        let x = stored_gate[stored + 1u + eight];
        let y = stored_up[stored + 1u + eight];
        for (var part = 0u; part < 2u; part++) {
            h[row * params.cols / 4u + 2u * eight + part] = activated(four_of(x, part, scales.x), four_of(y, part, scales.y));
        }
    }
}

// Computes the gradients from what is stored and the gradient of h.
@compute @workgroup_size(256)
fn backward_stored(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = id.x + id.y * grid.x;
    if (row >= params.rows) {
        return;
    }
    let stored = row * params.fours;
    let scales = vec2(power(bitcast<i32>(stored_gate[stored].x)), power(bitcast<i32>(stored_up[stored].x)));
    for (var four = thread; four < params.cols / 4u; four += 256u) {
        let x = four_of(stored_gate[stored + 1u + four / 2u], four % 2u, scales.x);
        let y = four_of(stored_up[stored + 1u + four / 2u], four % 2u, scales.y);
        let at = row * params.cols / 4u + four;
        let gradients = gradients_of(x, y, h[at]);
        gate[at] = gradients.gate;
        up[at] = gradients.up;
    }
}
