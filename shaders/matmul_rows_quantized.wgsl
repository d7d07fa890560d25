// Quantised weights as the right operand of matmul_rows.wgsl. It is combined with a codec, such as
// codec_nf4.wgsl. Eight elements are one word of codes.

fn prepare_b(thread: u32) {
    fill_tables(thread, LANES * COLUMNS);
}

// The eight elements at `i`. At least one of them is in the column.
fn load_b(i: u32, terms: Terms) -> Eight {
    let word = vec4(codes_at(i));
    let low = look_up(word >> vec4(0u, 4u, 8u, 12u));
    let high = look_up(word >> vec4(16u, 20u, 24u, 28u));
    let scale = scale_of((params.block_first + max(i, terms.start) - params.b_first) >> params.block_bits);
    return Eight(scale * low, scale * high);
}
