// A tile of 64 rows and 64 columns of an operand on its way to panels. It is combined with
// panels.wgsl, for kernels of 256 threads with the padded sides of the panels, `params.padded_rows`
// and `params.padded_cols`, and the panels, `out`. A thread puts four columns of two pairs of rows,
// and stores two pieces of 16 bytes after a barrier.

const TILE = 64u;
const LINE = 33u;       // words of a line of the tile, one of them unused, against bank conflicts

var<workgroup> tile: array<u32, 2112>;

// The first row and column of the tile of a workgroup.
fn corner_of(group: u32) -> vec2<u32> {
    let across = params.padded_cols / TILE;
    return vec2(group / across, group % across) * TILE;
}

// The first of the four columns of a thread, in the tile.
fn column_of(thread: u32) -> u32 {
    return 4u * (thread % 16u);
}

// A pair of rows of a thread: its first row in the tile is twice this.
fn pair_of_rows(thread: u32, i: u32) -> u32 {
    return thread / 16u + 16u * i;
}

// Puts four columns of a pair of rows. A line is a row of the tile: a word has two columns.
fn put(pair: u32, column: u32, first: vec2<u32>, second: vec2<u32>) {
    let at = 2u * pair * LINE + column / 2u;
    tile[at] = first.x;
    tile[at + 1u] = first.y;
    tile[at + LINE] = second.x;
    tile[at + LINE + 1u] = second.y;
}

// Piece 0..512 of the tile: eight columns of a row.
fn piece_of(piece: u32) -> vec4<u32> {
    let at = piece / 8u * LINE + piece % 8u * 4u;
    return vec4(tile[at], tile[at + 1u], tile[at + 2u], tile[at + 3u]);
}

// Where a piece of the tile is in the panels, in units of 16 bytes.
fn place_of(piece: u32, corner: vec2<u32>) -> u32 {
    let column = corner.y + piece % 8u * 8u;
    return (column / 32u * params.padded_rows + corner.x + piece / 8u) * 4u + column % 32u / 8u;
}

// Stores the tile, once all threads have put their columns.
fn store_tile(thread: u32, corner: vec2<u32>) {
    workgroupBarrier();
    for (var piece = thread; piece < 512u; piece += 256u) {
        out[place_of(piece, corner)] = piece_of(piece);
    }
}

// What `four_halves` takes as the largest magnitude of a row with exponent `e`: rows that are not
// finite have exponent 0.
fn largest_with(e: i32) -> u32 {
    return select(0u, 0x7f800000u, e == 0);
}
