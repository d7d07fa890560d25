// The workgroup memory that the kernels of attention on matrix units share. Included by their
// templates: see `ops::attention::source`.
//
// Before the loop, `tile` holds a part of the columns of a block, in rows of STAGE_STRIDE; matrices
// go from there to registers. In the loop it holds the rows of a round, in rows of TILE_STRIDE.

// Each variable is a multiple of 16 bytes: matrices are loaded from aligned addresses only.
var<workgroup> tile: array<vec4<f16>, TILE>;
var<workgroup> scores: array<vec4<f32>, SCORES>;
var<workgroup> weights: array<vec4<f16>, WEIGHTS>;

// Places 16 bytes of a copy.
fn place(at: u32, x: vec4<u32>) {
    tile[at] = vec4<f16>(vec2<f16>(unpack2x16float(x.x)), vec2<f16>(unpack2x16float(x.y)));
    tile[at + 1u] = vec4<f16>(vec2<f16>(unpack2x16float(x.z)), vec2<f16>(unpack2x16float(x.w)));
}

// Number n of the 16 bytes of a round: its place in `tile`. A second tensor of the round follows
// VALUE_TILE elements later.
fn tile_at(n: u32) -> u32 {
    return n / VECS * TILE_STRIDE + n % VECS * 2u;
}

// Number n of the 16 bytes of a part of a block: its place in `tile`, and in the copy from the
// block's first row on.
fn stage_at(n: u32) -> u32 {
    return n / (2u * CHUNK) * STAGE_STRIDE + n % (2u * CHUNK) * 2u;
}

fn staged(n: u32, part: u32) -> u32 {
    return n / (2u * CHUNK) * VECS + 2u * CHUNK * part + n % (2u * CHUNK);
}
