// Floats as the right operand of matmul_rows.wgsl. It is combined with matmul_floats.wgsl.

// Two floats of 16 bits.
fn pair_of(word: u32) -> vec2<f32> {
    if (FLOATS == 1u) {
        return unpack2x16float(word);
    }
    return vec2(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
}

// Element `i`, clamped to the column.
fn float_near(i: u32, terms: Terms) -> f32 {
    return float_at(clamp(i, terms.start, terms.end - 1u));
}

// The eight elements at `i`. At least one of them is in the column; the others are clamped to it.
fn load_b(i: u32, terms: Terms) -> Eight {
    if (WHOLE && FLOATS != 0u) {
        let at = i >> 1u;
        return Eight(vec4(pair_of(b[at]), pair_of(b[at + 1u])), vec4(pair_of(b[at + 2u]), pair_of(b[at + 3u])));
    }
    return Eight(
        vec4(float_near(i, terms), float_near(i + 1u, terms), float_near(i + 2u, terms), float_near(i + 3u, terms)),
        vec4(float_near(i + 4u, terms), float_near(i + 5u, terms), float_near(i + 6u, terms), float_near(i + 7u, terms)),
    );
}
