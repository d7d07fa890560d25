// The right operand of matmul_rows.wgsl as quantised weights; a codec belongs to it, such as
// codec_nf4.wgsl. An eight is a word of codes.

fn prepare_b(thread: u32) {
    fill_tables(thread, LANES * COLUMNS);
}

// The eight at element `i`, some of which the column has.
fn load_b(i: u32, terms: Terms) -> Eight {
    let word = vec4(codes_at(i));
    let low = look_up(word >> vec4(0u, 4u, 8u, 12u));
    let high = look_up(word >> vec4(16u, 20u, 24u, 28u));
    let scale = scale_of((params.block_first + max(i, terms.start) - params.b_first) >> params.block_bits);
    return Eight(scale * low, scale * high);
}
