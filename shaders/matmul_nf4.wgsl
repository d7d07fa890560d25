// The right operand of matmul.wgsl as NF4 weights; nf4_tables.wgsl belongs to it. `b_first` counts from the first element of `codes`.

override B_BY_TERM: bool = true;    // neighbours in memory are terms of one column of b, else columns of one term
override WHOLE: bool = true;        // every row of the weights starts with a word of codes

fn prepare_b(thread: u32) {
    fill_tables(thread, TX * TY);
}

// The scale of the element that lies `offset` elements after b[0, 0].
fn scale_at(offset: u32) -> f32 {
    return scale_of((params.block_first + offset) >> params.block_bits);
}

// The codes from that element on, the first in the lowest bits: as many as its word still has.
fn codes_at(offset: u32) -> u32 {
    let at = params.b_first + offset;
    return codes[at >> 3u] >> (4u * (at & 7u));
}

fn weight_at(offset: u32) -> f32 {
    return codebook[codes_at(offset) & 15u] * scale_at(offset);
}

// Values of the lowest code of each word.
fn look_up(words: vec4<u32>) -> vec4<f32> {
    let i = words & vec4(15u);
    return vec4(codebook[i.x], codebook[i.y], codebook[i.z], codebook[i.w]);
}

// Where half a word is decoded at once, a four has neighbours.
fn columns_of(four: u32) -> vec4<u32> {
    if (WHOLE && !B_BY_TERM) {
        return vec4(4u * four) + vec4(0u, 1u, 2u, 3u);
    }
    return spread(four, TX);
}

// Where the columns of a four start; for those past the last, where the last starts.
fn starts_of(column: u32, four: u32) -> vec4<u32> {
    return min(column + columns_of(four), vec4(params.n - 1u)) * params.b_column;
}

// Rows of any length: each element by itself.
fn fill_any(column: u32, first: u32, end: u32, thread: u32) {
    for (var i = thread; i < TK * 2u * TX; i += TX * TY) {
        let term = i % TK;
        let four = i / TK;
        var values = vec4<f32>();
        if (first + term < end) {
            let at = starts_of(column, four) + (first + term) * params.b_term;
            values = vec4(weight_at(at.x), weight_at(at.y), weight_at(at.z), weight_at(at.w));
        }
        tile_b[term * (2u * TX + 1u) + four] = values;
    }
}

// Two terms of four columns: two codes out of each of four words.
fn fill_by_term(column: u32, first: u32, end: u32, thread: u32) {
    for (var i = thread; i < TK * TX; i += TX * TY) {
        let term = 2u * (i % (TK / 2u));
        let four = i / (TK / 2u);
        var even = vec4<f32>();
        var odd = vec4<f32>();
        if (first + term < end) {
            let at = starts_of(column, four) + first + term;
            let words = vec4(codes_at(at.x), codes_at(at.y), codes_at(at.z), codes_at(at.w));
            let scale = vec4(scale_at(at.x), scale_at(at.y), scale_at(at.z), scale_at(at.w));
            even = look_up(words) * scale;
            odd = look_up(words >> vec4(4u)) * scale;
        }
        tile_b[term * (2u * TX + 1u) + four] = even;
        tile_b[(term + 1u) * (2u * TX + 1u) + four] = odd;
    }
}

// Four columns of a term: half a word.
fn fill_by_column(column: u32, first: u32, end: u32, thread: u32) {
    for (var i = thread; i < TK * 2u * TX; i += TX * TY) {
        let term = i / (2u * TX);
        let four = i % (2u * TX);
        var values = vec4<f32>();
        if (first + term < end) {
            let at = min(column + 4u * four, params.n - 4u) + (first + term) * params.b_term;
            values = look_up(vec4(codes_at(at)) >> vec4(0u, 4u, 8u, 12u)) * scale_at(at);
        }
        tile_b[term * (2u * TX + 1u) + four] = values;
    }
}

// As `fill_a`, with columns for rows.
fn fill_b(column: u32, first: u32, end: u32, thread: u32) {
    if (!WHOLE) {
        fill_any(column, first, end, thread);
    } else if (B_BY_TERM) {
        fill_by_term(column, first, end, thread);
    } else {
        fill_by_column(column, first, end, thread);
    }
}
