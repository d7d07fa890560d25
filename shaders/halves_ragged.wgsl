// Matrices for halves.wgsl of any number of columns.

@group(0) @binding(0) var<storage, read_write> x: array<f32>;             // [rows, cols]

fn element_at(row: u32, column: u32) -> f32 {
    if (column < params.cols) {
        return x[row * params.cols + column];
    }
    return 0.0;
}

// Columns `column..column + 4` of a row. Zeros past the last column.
fn four_at(row: u32, column: u32) -> vec4<f32> {
    return vec4(
        element_at(row, column),
        element_at(row, column + 1u),
        element_at(row, column + 2u),
        element_at(row, column + 3u),
    );
}

fn set_four(row: u32, column: u32, values: vec4<f32>) {
    for (var i = 0u; i < 4u && column + i < params.cols; i++) {
        x[row * params.cols + column + i] = values[i];
    }
}
