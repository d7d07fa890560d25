// Matrices for halves.wgsl whose number of columns is a multiple of 8.

@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;       // [rows, cols]

// Columns `column..column + 4` of a row.
fn four_at(row: u32, column: u32) -> vec4<f32> {
    return x[(row * params.cols + column) / 4u];
}

fn set_four(row: u32, column: u32, values: vec4<f32>) {
    x[(row * params.cols + column) / 4u] = values;
}
