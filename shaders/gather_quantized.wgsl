// Quantised weights as the table of gather.wgsl. It is combined with a codec, such as
// codec_nf4.wgsl.

fn prepare(thread: u32) {
    fill_tables(thread, WORKGROUP);
}

// The bits of element `at` of the window.
fn element(at: u32) -> u32 {
    let value = look_up(vec4(codes_at(params.first + at))).x;
    return bitcast<u32>(value * scale_of((params.block_first + at) >> params.block_bits));
}
