// Floats for panels_decode.wgsl. It is combined with matmul_floats.wgsl.

fn prepare(thread: u32) {
    prepare_b(thread);
}

fn magnitude_of(element: u32) -> u32 {
    return magnitude_bits(float_at(params.b_first + element));
}

// Two floats of 16 bits.
fn pair_of(word: u32) -> vec2<f32> {
    if (FLOATS == 1u) {
        return unpack2x16float(word);
    }
    return vec2(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
}

// Element `i` of the eight, or 0 past their number.
fn element_of(at: u32, i: u32, count: u32) -> f32 {
    if (i >= count) {
        return 0.0;
    }
    return float_at(at + i);
}

// The `count` elements from `offset` on, and zeros.
fn eight_at(offset: u32, count: u32) -> Eight {
    let at = params.b_first + offset;
    if (WHOLE && FLOATS != 0u) {
        let word = at >> 1u;
        return Eight(vec4(pair_of(b[word]), pair_of(b[word + 1u])), vec4(pair_of(b[word + 2u]), pair_of(b[word + 3u])));
    }
    return Eight(
        vec4(element_of(at, 0u, count), element_of(at, 1u, count), element_of(at, 2u, count), element_of(at, 3u, count)),
        vec4(element_of(at, 4u, count), element_of(at, 5u, count), element_of(at, 6u, count), element_of(at, 7u, count)),
    );
}
