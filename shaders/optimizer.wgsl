// The norm of a gradient, and a step of AdamW. Runs unchecked: the host proves that `gradient`,
// `parameters`, `exp_avg` and `exp_avg_sq` hold `count` floats, `partials` one for each block of
// all pieces, and `loss` one.

struct Params {
    count: u32,             // number of elements; in `norm`: number of blocks
    first: u32,             // the first block of this piece
    largest_norm: f32,
    decay: f32,             // 1 - learning rate * weight decay
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    step_size: f32,         // learning rate / (1 - beta1^t)
    root_bias2: f32,        // sqrt(1 - beta2^t)
    epsilon: f32,
    pad: u32,
}

struct Report {
    norm: f32,
    clip: f32,      // clip factor of the gradient
    applied: f32,   // 1, or 0 if norm or loss is not finite
    pad: f32,
}

@group(0) @binding(0) var<storage, read> gradient: array<f32>;
@group(0) @binding(1) var<storage, read_write> partials: array<f32>;
@group(0) @binding(2) var<storage, read_write> report: Report;
@group(0) @binding(3) var<storage, read> loss: array<f32>;
@group(0) @binding(4) var<storage, read_write> parameters: array<f32>;
@group(0) @binding(5) var<storage, read_write> exp_avg: array<f32>;
@group(0) @binding(6) var<storage, read_write> exp_avg_sq: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;
const BLOCK = 16384u;   // elements per workgroup in the sum of squares

var<workgroup> sums: array<f32, WORKGROUP>;

// The sum over the threads, in a fixed order.
fn group_sum(thread: u32, value: f32) -> f32 {
    sums[thread] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (thread < half) { sums[thread] += sums[thread + half]; }
        workgroupBarrier();
    }
    return sums[0];
}

@compute @workgroup_size(WORKGROUP)
fn squares(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let block = id.x + id.y * grid.x;
    let start = block * BLOCK;
    if (start >= params.count) { return; }
    let end = min(start + BLOCK, params.count);
    var sum = 0.0;
    for (var i = start + thread; i < end; i += WORKGROUP) { sum += gradient[i] * gradient[i]; }
    sum = group_sum(thread, sum);
    if (thread == 0u) { partials[params.first + block] = sum; }
}

fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

@compute @workgroup_size(WORKGROUP)
fn norm(@builtin(local_invocation_index) thread: u32) {
    var sum = 0.0;
    for (var i = thread; i < params.count; i += WORKGROUP) { sum += partials[i]; }
    sum = group_sum(thread, sum);
    if (thread == 0u) {
        // A driver may compute a finite square root of NaN.
        let total = select(sum, sqrt(sum), is_finite(sum));
        let limit = total + 1e-6;
        var clip = 1.0;
        if (params.largest_norm < limit) { clip = params.largest_norm / limit; }
        report = Report(total, clip, select(0.0, 1.0, is_finite(sum) && is_finite(loss[0])), 0.0);
    }
}

@compute @workgroup_size(WORKGROUP)
fn update(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i >= params.count || report.applied == 0.0) { return; }
    let g = gradient[i] * report.clip;
    let m = params.beta1 * exp_avg[i] + params.one_minus_beta1 * g;
    let v = params.beta2 * exp_avg_sq[i] + params.one_minus_beta2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    parameters[i] = parameters[i] * params.decay - params.step_size * m / (sqrt(v) / params.root_bias2 + params.epsilon);
}
