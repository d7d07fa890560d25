// Quantised weights as the right operand of matmul.wgsl. It is combined with a codec, such as
// codec_nf4.wgsl. `b_first` counts from the first element of `codes`.

override B_BY_TERM: bool = true;    // terms of a column of b are adjacent in memory, else columns of a term
override WHOLE: bool = true;        // every row of the weights starts on a word of codes

fn prepare_b(thread: u32) {
    fill_tables(thread, TX * TY);
}

// The scale of the element at `offset` from b[0, 0].
fn scale_at(offset: u32) -> f32 {
    return scale_of((params.block_first + offset) >> params.block_bits);
}

// If half a word is decoded at once, a vec4 has four adjacent columns.
fn columns_of(four: u32) -> vec4<u32> {
    if (WHOLE && !B_BY_TERM) {
        return vec4(4u * four) + vec4(0u, 1u, 2u, 3u);
    }
    return spread(four, TX);
}

// The offset of each column of a vec4. Columns past the last get the offset of the last.
fn starts_of(column: u32, four: u32) -> vec4<u32> {
    return min(column + columns_of(four), vec4(params.n - 1u)) * params.b_column;
}

// Codes and scales of the fetched vec4s: 2 TK / TY per thread (TY is at least 4). They are decoded
// in `place_b`, after they have arrived.
var<private> next_codes: array<vec4<u32>, 8>;
var<private> next_scales: array<vec4<f32>, 8>;

// Fetches the words and scales of four columns.
fn fetch_four(j: u32, at: vec4<u32>) {
    let i = params.b_first + at;
    next_codes[j] = vec4(codes_at(i.x), codes_at(i.y), codes_at(i.z), codes_at(i.w));
    next_scales[j] = vec4(scale_at(at.x), scale_at(at.y), scale_at(at.z), scale_at(at.w));
}

// For rows of any length: fetches each element separately.
fn fetch_any(column: u32, first: u32, end: u32, thread: u32) {
    for (var j = 0u; j < 2u * TK / TY; j++) {
        let place = place_of(j, thread, 2u * TX, true);
        next_scales[j] = vec4<f32>();
        if (first + place.x < end) {
            fetch_four(j, starts_of(column, place.y) + (first + place.x) * params.b_term);
        }
    }
}

fn place_any(thread: u32) {
    for (var j = 0u; j < 2u * TK / TY; j++) {
        let place = place_of(j, thread, 2u * TX, true);
        tile_b[place.x * (2u * TX + 1u) + place.y] = look_up(next_codes[j]) * next_scales[j];
    }
}

// Two terms of four columns: two codes from each of four words.
fn fetch_by_term(column: u32, first: u32, end: u32, thread: u32) {
    for (var j = 0u; j < TK / TY; j++) {
        let i = thread + j * TX * TY;
        let term = first + 2u * (i % (TK / 2u));
        next_scales[j] = vec4<f32>();
        if (term < end) {
            fetch_four(j, starts_of(column, i / (TK / 2u)) + term);
        }
    }
}

fn place_by_term(thread: u32) {
    for (var j = 0u; j < TK / TY; j++) {
        let i = thread + j * TX * TY;
        let at = 2u * (i % (TK / 2u)) * (2u * TX + 1u) + i / (TK / 2u);
        tile_b[at] = look_up(next_codes[j]) * next_scales[j];
        tile_b[at + 2u * TX + 1u] = look_up(next_codes[j] >> vec4(4u)) * next_scales[j];
    }
}

// Four columns of a term: half a word.
fn fetch_by_column(column: u32, first: u32, end: u32, thread: u32) {
    for (var j = 0u; j < 2u * TK / TY; j++) {
        let place = place_of(j, thread, 2u * TX, false);
        next_scales[j].x = 0.0;
        if (first + place.x < end) {
            let at = min(column + 4u * place.y, params.n - 4u) + (first + place.x) * params.b_term;
            next_codes[j].x = codes_at(params.b_first + at);
            next_scales[j].x = scale_at(at);
        }
    }
}

fn place_by_column(thread: u32) {
    for (var j = 0u; j < 2u * TK / TY; j++) {
        let place = place_of(j, thread, 2u * TX, false);
        let words = vec4(next_codes[j].x) >> vec4(0u, 4u, 8u, 12u);
        tile_b[place.x * (2u * TX + 1u) + place.y] = look_up(words) * next_scales[j].x;
    }
}

// As `fetch_a`, with columns instead of rows.
fn fetch_b(column: u32, first: u32, end: u32, thread: u32) {
    if (!WHOLE) {
        fetch_any(column, first, end, thread);
    } else if (B_BY_TERM) {
        fetch_by_term(column, first, end, thread);
    } else {
        fetch_by_column(column, first, end, thread);
    }
}

fn place_b(thread: u32) {
    if (!WHOLE) {
        place_any(thread);
    } else if (B_BY_TERM) {
        place_by_term(thread);
    } else {
        place_by_column(thread);
    }
}
