// The right operand of matmul.wgsl as floats; matmul_floats.wgsl belongs to it.

override B_BY_TERM: bool = true;    // neighbours in memory are terms of one column of b, else columns of one term

fn columns_of(four: u32) -> vec4<u32> {
    return spread(four, TX);
}

// As `fill_a`, with columns for rows.
fn fill_b(column: u32, first: u32, end: u32, thread: u32) {
    for (var i = thread; i < TK * 2u * TX; i += TX * TY) {
        let term = select(i / (2u * TX), i % TK, B_BY_TERM);
        let four = select(i % (2u * TX), i / TK, B_BY_TERM);
        var values = vec4<f32>();
        if (first + term < end) {
            let columns = min(column + columns_of(four), vec4(params.n - 1u));
            let at = params.b_first + columns * params.b_column + (first + term) * params.b_term;
            values = vec4(float_at(at.x), float_at(at.y), float_at(at.z), float_at(at.w));
        }
        tile_b[term * (2u * TX + 1u) + four] = values;
    }
}
