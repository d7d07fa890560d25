// The right operand of matmul_rows.wgsl as NF4 weights; nf4_tables.wgsl belongs to it. An eight is a word of codes.

fn prepare_b(thread: u32) {
    fill_tables(thread, LANES * COLUMNS);
}

// The eight at element `i`, some of which the column has.
fn load_b(i: u32, terms: Terms) -> Eight {
    let word = codes[i >> 3u];
    let low = (vec4(word) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u);
    let high = (vec4(word) >> vec4(16u, 20u, 24u, 28u)) & vec4(15u);
    let scale = scale_of((params.block_first + max(i, terms.start) - params.b_first) >> params.block_bits);
    return Eight(
        scale * vec4(codebook[low.x], codebook[low.y], codebook[low.z], codebook[low.w]),
        scale * vec4(codebook[high.x], codebook[high.y], codebook[high.z], codebook[high.w]),
    );
}
