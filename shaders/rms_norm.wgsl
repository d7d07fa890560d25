// y = x * rsqrt(mean(x^2) + epsilon) * gamma per row, and the gradient of x. Runs unchecked: the
// host proves that `x`, `dy` and the output hold `rows * width` floats, and `gamma` holds `width`.

struct Params {
    rows: u32,
    width: u32,
    epsilon: f32,
    add: u32,       // 1 to add to the output
}

@group(0) @binding(0) var<storage, read> x: array<f32>;         // [rows, width]
@group(0) @binding(1) var<storage, read> gamma: array<f32>;     // [width]
@group(0) @binding(2) var<storage, read> dy: array<f32>;        // [rows, width]
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // [rows, width]: y, or dx
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;
override LANES: u32 = 256u; // threads per row: a power of two, at most WORKGROUP

var<workgroup> partial: array<vec2<f32>, WORKGROUP>;

// The sum over the threads of a row, in a fixed order.
fn row_sum(thread: u32, value: vec2<f32>) -> vec2<f32> {
    let lane = thread % LANES;
    partial[thread] = value;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if (lane < half) { partial[thread] += partial[thread + half]; }
        workgroupBarrier();
    }
    return partial[thread - lane];
}

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = (id.x + id.y * grid.x) * (WORKGROUP / LANES) + thread / LANES;
    let lane = thread % LANES;
    let start = row * params.width;
    // Rows past the end have no elements, but their threads take part in the barriers.
    let width = select(0u, params.width, row < params.rows);
    var squares = 0.0;
    for (var i = lane; i < width; i += LANES) {
        let value = x[start + i];
        squares += value * value;
    }
    let r = inverseSqrt(row_sum(thread, vec2(squares, 0.0)).x / f32(params.width) + params.epsilon);
    for (var i = lane; i < width; i += LANES) {
        let y = x[start + i] * r * gamma[i];
        if (params.add != 0u) { out[start + i] += y; } else { out[start + i] = y; }
    }
}

@compute @workgroup_size(WORKGROUP)
fn backward(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = (id.x + id.y * grid.x) * (WORKGROUP / LANES) + thread / LANES;
    let lane = thread % LANES;
    let start = row * params.width;
    let width = select(0u, params.width, row < params.rows);
    var sums = vec2(0.0);
    for (var i = lane; i < width; i += LANES) {
        let value = x[start + i];
        sums += vec2(value, dy[start + i] * gamma[i]) * value;
    }
    let mean = row_sum(thread, sums) / f32(params.width);
    let r = inverseSqrt(mean.x + params.epsilon);
    let along = r * r * mean.y;
    for (var i = lane; i < width; i += LANES) {
        let dx = r * (dy[start + i] * gamma[i] - along * x[start + i]);
        if (params.add != 0u) { out[start + i] += dx; } else { out[start + i] = dx; }
    }
}
