// Codes of 4 bits as the storage of the weights of matmul_wide.wgsl: 32 per vec4. A block has at
// least 32. It is combined with the functions of a codec over joined weights: see
// codec_nf4_joined.wgsl.

const CHUNK = 32u;

fn prepare(thread: u32, threads: u32) {
    fill_tables(thread, threads);
}

// The vec4s of four columns, and what is stored of their scales.
struct Loaded {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
    stored: StoredScales,
}

fn blocks_of(columns: Columns, chunk: u32) -> vec4<u32> {
    return (columns.elements + CHUNK * chunk) >> vec4(params.block_bits);
}

fn load(columns: Columns, chunk: u32) -> Loaded {
    var loaded: Loaded;
    let at = columns.starts + chunk;
    loaded.a = weights[at.x];
    loaded.b = weights[at.y];
    loaded.c = weights[at.z];
    loaded.d = weights[at.w];
    loaded.stored = load_scales(columns.numbers, blocks_of(columns, chunk));
    return loaded;
}

fn decode(codes: vec4<u32>) -> Eight {
    return Eight(
        look_up(codes),
        look_up(codes >> vec4(4u)),
        look_up(codes >> vec4(8u)),
        look_up(codes >> vec4(12u)),
        look_up(codes >> vec4(16u)),
        look_up(codes >> vec4(20u)),
        look_up(codes >> vec4(24u)),
        look_up(codes >> vec4(28u)),
    );
}

fn add_chunk(sums: Sums, c: u32, chunk: u32, columns: Columns, loaded: Loaded) -> Sums {
    let l = loaded;
    var terms: Sums;
    terms = add_eight(terms, c, 0u, decode(vec4(l.a.x, l.b.x, l.c.x, l.d.x)));
    terms = add_eight(terms, c, 1u, decode(vec4(l.a.y, l.b.y, l.c.y, l.d.y)));
    terms = add_eight(terms, c, 2u, decode(vec4(l.a.z, l.b.z, l.c.z, l.d.z)));
    terms = add_eight(terms, c, 3u, decode(vec4(l.a.w, l.b.w, l.c.w, l.d.w)));
    return add_scaled(sums, terms, scales_from(columns.numbers, blocks_of(columns, chunk), l.stored));
}
