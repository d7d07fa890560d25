// Quantised weights for panels_decode.wgsl. It is combined with a codec, such as codec_nf4.wgsl.

fn prepare(thread: u32) {
    fill_tables(thread, 256u);
}

// No weight exceeds the scale of its block in magnitude.
fn magnitude_of(block: u32) -> u32 {
    return magnitude_bits(scale_of(block));
}

fn scale_at(offset: u32) -> f32 {
    return scale_of((params.block_first + offset) >> params.block_bits);
}

// Element `i` of the eight, or 0 past their number.
fn element_of(offset: u32, i: u32, count: u32) -> f32 {
    if (i >= count) {
        return 0.0;
    }
    return look_up(vec4(codes_at(params.b_first + offset + i))).x * scale_at(offset + i);
}

// The `count` elements from `offset` on, and zeros.
fn eight_at(offset: u32, count: u32) -> Eight {
    if (WHOLE) {
        let word = vec4(codes_at(params.b_first + offset));
        let scale = scale_at(offset);
        let low = look_up(word >> vec4(0u, 4u, 8u, 12u));
        let high = look_up(word >> vec4(16u, 20u, 24u, 28u));
        return Eight(scale * low, scale * high);
    }
    return Eight(
        vec4(element_of(offset, 0u, count), element_of(offset, 1u, count), element_of(offset, 2u, count), element_of(offset, 3u, count)),
        vec4(element_of(offset, 4u, count), element_of(offset, 5u, count), element_of(offset, 6u, count), element_of(offset, 7u, count)),
    );
}
