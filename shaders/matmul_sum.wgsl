// Sums the chunks of a matrix product in a fixed order: out = scale * (sum (+ bias)) (+ out). Runs
// unchecked: `ops::matmul` proves on the host that every index is in its binding.

struct Params {
    count: u32,         // elements of the product
    chunks: u32,        // partial products to sum
    n: u32,             // columns
    out_first: u32,     // index of out[0, 0]
    out_row: u32,       // elements from out[i, j] to out[i + 1, j]
    bias_first: u32,
    has_bias: u32,
    add: u32,           // 1 to add the sum to `out`
    scale: f32,
    out_column: u32,    // elements from out[i, j] to out[i, j + 1]
    pad1: u32,
    pad2: u32,
}

@group(0) @binding(0) var<storage, read> parts: array<f32>;
@group(0) @binding(1) var<storage, read> bias: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const WORKGROUP = 256u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = (id.x + id.y * grid.x) * WORKGROUP + thread;
    if (i >= params.count) {
        return;
    }
    var sum = 0.0;
    for (var chunk = 0u; chunk < params.chunks; chunk++) {
        sum += parts[chunk * params.count + i];
    }
    let column = i % params.n;
    let at = params.out_first + i / params.n * params.out_row + column * params.out_column;
    var value = sum;
    if (params.has_bias == 1u) { value += bias[params.bias_first + column]; }
    value *= params.scale;
    if (params.add == 1u) { value += out[at]; }
    out[at] = value;
}
