// Stores the rows of a float32 matrix as f16, each row with a power of two, in half the memory. It
// is combined with panels.wgsl, and halves_whole.wgsl or halves_ragged.wgsl. A workgroup takes a
// row. Runs unchecked: the host proves that `x` has `rows * cols` floats, and that `halves` has
// `rows * fours` times 16 bytes.
//
// A row of `halves` has its exponent in the first 16 bytes, and eight elements in each 16 bytes
// after them. Elements past the last column are zeros.

struct Params {
    rows: u32,
    cols: u32,
    fours: u32,     // of a row in `halves`
    pad: u32,
}

@group(0) @binding(1) var<storage, read_write> halves: array<vec4<u32>>;  // [rows, fours]
@group(1) @binding(0) var<uniform> params: Params;

// The largest magnitude of a row.
fn largest_at(row: u32, thread: u32) -> u32 {
    var bits = vec4<u32>();
    for (var column = 8u * thread; column < params.cols; column += 2048u) {
        bits = max(bits, bitcast<vec4<u32>>(four_at(row, column)) & vec4(0x7fffffffu));
        bits = max(bits, bitcast<vec4<u32>>(four_at(row, column + 4u)) & vec4(0x7fffffffu));
    }
    return largest_of(thread, max(max(bits.x, bits.y), max(bits.z, bits.w)));
}

fn eight_halves(row: u32, column: u32, scale: f32, largest: u32) -> vec4<u32> {
    let low = four_halves(four_at(row, column), scale, largest);
    return vec4(low, four_halves(four_at(row, column + 4u), scale, largest));
}

fn set_eight(row: u32, column: u32, eight: vec4<u32>, scale: f32) {
    set_four(row, column, vec4(unpack2x16float(eight.x), unpack2x16float(eight.y)) * scale);
    set_four(row, column + 4u, vec4(unpack2x16float(eight.z), unpack2x16float(eight.w)) * scale);
}

// Rounds `x` as `keep` and `load` do.
@compute @workgroup_size(256)
fn round_rows(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = id.x + id.y * grid.x;
    if (row >= params.rows) {
        return;
    }
    let largest = largest_at(row, thread);
    let exponent = exponent_of(largest);
    for (var column = 8u * thread; column < params.cols; column += 2048u) {
        set_eight(row, column, eight_halves(row, column, power(-exponent), largest), power(exponent));
    }
}

// Stores a row, and rounds it if `rounds`.
fn keep_row(row: u32, thread: u32, rounds: bool) {
    let largest = largest_at(row, thread);
    let exponent = exponent_of(largest);
    let start = row * params.fours;
    if (thread == 0u) {
        halves[start] = vec4(bitcast<u32>(exponent), 0u, 0u, 0u);
    }
    for (var column = 8u * thread; column < params.cols; column += 2048u) {
        let eight = eight_halves(row, column, power(-exponent), largest);
        halves[start + 1u + column / 8u] = eight;
        if (rounds) {
            set_eight(row, column, eight, power(exponent));
        }
    }
}

// Stores `x`.
@compute @workgroup_size(256)
fn keep(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = id.x + id.y * grid.x;
    if (row < params.rows) {
        keep_row(row, thread, false);
    }
}

// Stores `x` and rounds it.
@compute @workgroup_size(256)
fn keep_rounded(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = id.x + id.y * grid.x;
    if (row < params.rows) {
        keep_row(row, thread, true);
    }
}

// Writes what `keep` stored to `x`.
@compute @workgroup_size(256)
fn load(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = id.x + id.y * grid.x;
    if (row >= params.rows) {
        return;
    }
    let start = row * params.fours;
    let scale = power(bitcast<i32>(halves[start].x));
    for (var column = 8u * thread; column < params.cols; column += 2048u) {
        set_eight(row, column, halves[start + 1u + column / 8u], scale);
    }
}
