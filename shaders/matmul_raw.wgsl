// The right operand of matmul.wgsl as floats of 32 or 16 bits.

@group(0) @binding(0) var<storage, read> b: array<u32>;     // a float of 32 bits, or two of 16 bits, the first in the low half

override FLOATS: u32 = 0u;          // 0 f32, 1 f16, 2 bf16
override B_BY_TERM: bool = true;    // neighbours in memory are terms of one column of b, else columns of one term

fn float_at(at: u32) -> f32 {
    if (FLOATS == 0u) {
        return bitcast<f32>(b[at]);
    }
    let half = (b[at >> 1u] >> (16u * (at & 1u))) & 0xffffu;
    if (FLOATS == 1u) {
        return unpack2x16float(half).x;
    }
    return bitcast<f32>(half << 16u);
}

fn prepare_b(thread: u32) {}

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
