// The right operand of matmul.wgsl as floats; matmul_floats.wgsl belongs to it.

override B_BY_TERM: bool = true;    // neighbours in memory are terms of one column of b, else columns of one term

fn columns_of(four: u32) -> vec4<u32> {
    return spread(four, TX);
}

// As `next_a`: 2 TK / TY of them (TY is 4 at least).
var<private> next_b: array<vec4<f32>, 8>;

// As `fetch_a`, with columns for rows.
fn fetch_b(column: u32, first: u32, end: u32, thread: u32) {
    for (var j = 0u; j < 2u * TK / TY; j++) {
        let place = place_of(j, thread, 2u * TX, B_BY_TERM);
        let term = first + place.x;
        next_b[j] = vec4<f32>();
        if (term < end) {
            let columns = min(column + columns_of(place.y), vec4(params.n - 1u));
            let at = params.b_first + columns * params.b_column + term * params.b_term;
            next_b[j] = vec4(float_at(at.x), float_at(at.y), float_at(at.z), float_at(at.w));
        }
    }
}

fn place_b(thread: u32) {
    for (var j = 0u; j < 2u * TK / TY; j++) {
        let place = place_of(j, thread, 2u * TX, B_BY_TERM);
        tile_b[place.x * (2u * TX + 1u) + place.y] = next_b[j];
    }
}
