// Floats as the right operand of matmul.wgsl. It is combined with matmul_floats.wgsl.

override B_BY_TERM: bool = true;    // terms of a column of b are adjacent in memory, else columns of a term

fn columns_of(four: u32) -> vec4<u32> {
    return spread(four, TX);
}

// As `next_a`: 2 TK / TY per thread (TY is at least 4).
var<private> next_b: array<vec4<f32>, 8>;

// As `fetch_a`, with columns instead of rows.
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
