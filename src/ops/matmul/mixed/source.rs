//! The WGSL of a product on matrix units, for one tile and one orientation of its operands.
//!
//! A workgroup computes a tile of the result. It holds a tile of each operand, [`WIDTH`] terms
//! long, in workgroup memory. In each round, every thread loads its part of the next tiles into
//! registers, and the subgroups multiply the present ones. Then the threads place what they loaded.
//!
//! ```text
//!   load the first tiles, place them, barrier
//!   for each further WIDTH terms
//!       load the next tiles        16 bytes at a time
//!       multiply the present ones  each subgroup its part of the tile, 16 x 16 x 16 at a time
//!       barrier; place; barrier
//!   multiply the last tiles
//!   the terms of an adapter        scale the sums; load, place and multiply further tiles
//!   store 16 x 16 sums at a time   through workgroup memory, scaled
//! ```
//!
//! What was loaded lives as u32 within one round. f16 variables that live from one round to the
//! next make the threads wait for memory before they multiply.
//!
//! A row of a tile in workgroup memory has 16 bytes more than its elements. Then rows of adjacent
//! threads share no banks, if threads that load 64-byte rows take them in the order
//! 0 4 1 5 2 6 3 7.
//!
//! Matrices of the units must lie at multiples of 16 bytes, and so must their rows. Otherwise
//! drivers load garbage without an error. So all workgroup variables have a multiple of 16 bytes.

use std::fmt::Write as _;

use crate::ops::matmul::panels::{Terms, WIDTH};

/// Side of the matrices that the units multiply.
const UNIT: u32 = 16;
/// Threads of a subgroup.
const SUBGROUP: u32 = 32;

/// Rows and columns of the result per workgroup, and those per subgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    pub m: u32,
    pub n: u32,
    pub subgroup_m: u32,
    pub subgroup_n: u32,
}

/// The properties that select a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Form {
    pub tile: Tile,
    /// The side of each operand over which the sums run.
    pub left: Terms,
    pub right: Terms,
    /// Whether the sums have the terms of an adapter, too.
    pub adapted: bool,
    /// Whether the result has whole groups of four columns, at multiples of four elements.
    pub fours: bool,
}

impl Tile {
    /// 16 sums of 16 x 16 in the registers of each subgroup.
    pub const LARGE: Self = Self { m: 128, n: 128, subgroup_m: 64, subgroup_n: 64 };

    /// For few columns, such as the rank of an adapter.
    pub const NARROW: Self = Self { m: 128, n: 32, subgroup_m: 32, subgroup_n: 32 };

    /// The tile for this number of columns.
    pub fn of(n: u32) -> Self {
        if n <= Self::NARROW.n { Self::NARROW } else { Self::LARGE }
    }

    fn threads(self) -> u32 {
        self.m / self.subgroup_m * (self.n / self.subgroup_n) * SUBGROUP
    }

    /// Workgroups that cover a matrix.
    pub fn groups(self, m: u32, n: u32) -> u64 {
        u64::from(m.div_ceil(self.m)) * u64::from(n.div_ceil(self.n))
    }
}

/// An operand in the source. All its names start with `name`, those of its memory with `memory`.
struct Operand {
    name: &'static str,
    memory: &'static str,
    terms: Terms,
    /// Rows or columns of the result in a tile.
    side: u32,
    threads: u32,
}

impl Operand {
    /// `vec4<f16>`s of a row in workgroup memory.
    fn stride(&self) -> u32 {
        let elements = if self.terms == Terms::Columns { WIDTH } else { self.side };
        elements / 4 + 2
    }

    fn fours(&self) -> u32 {
        let rows = if self.terms == Terms::Columns { self.side } else { WIDTH };
        rows * self.stride()
    }

    /// Loads of 16 bytes per thread and round.
    fn loads(&self) -> u32 {
        self.side * WIDTH / 8 / self.threads
    }

    /// The part of the thread in each tile: where it loads, and where it places.
    fn part(&self) -> String {
        let (name, stride) = (self.name, self.stride());
        match self.terms {
            Terms::Columns => format!(
                "    let {name}_row = spread(thread / 4u);
    let {name}_place = {name}_row * {stride}u + thread % 4u * 2u;
"
            ),
            Terms::Rows => format!(
                "    let {name}_row = spread(thread % 128u / 4u);
    let {name}_panel = thread / 128u;
    let {name}_place = {name}_row * {stride}u + {name}_panel * 8u + thread % 4u * 2u;
"
            ),
        }
    }

    /// The index of the thread's first load. `first` is the first term, and `side` the first row or
    /// column of the tile in the result.
    fn start(&self, first: &str, side: &str) -> String {
        let Self { name, memory, .. } = *self;
        let quads = format!("params.{memory}_rows * 4u");
        match self.terms {
            Terms::Columns => format!(
                "    var {memory}_at = params.{memory}_first + {first} / {WIDTH}u * {quads} + ({side} + {name}_row) * 4u + thread % 4u;
"
            ),
            Terms::Rows => format!(
                "    var {memory}_at = params.{memory}_first + ({side} / {WIDTH}u + {name}_panel) * {quads} + ({first} + {name}_row) * 4u + thread % 4u;
"
            ),
        }
    }

    fn load(&self) -> String {
        let Self { name, memory, threads, .. } = *self;
        let step = match self.terms {
            Terms::Columns => format!("{threads}u"),
            Terms::Rows => format!("{}u * params.{memory}_rows", threads / 128 * 4),
        };
        (0..self.loads()).map(|i| format!("        let {name}_{i} = {memory}[{memory}_at + {i}u * {step}];\n")).collect()
    }

    /// The next [`WIDTH`] terms.
    fn advance(&self) -> String {
        let memory = self.memory;
        match self.terms {
            Terms::Columns => format!("        {memory}_at += params.{memory}_rows * 4u;\n"),
            Terms::Rows => format!("        {memory}_at += {}u;\n", WIDTH * 4),
        }
    }

    fn place(&self) -> String {
        let Self { name, threads, .. } = *self;
        let step = match self.terms {
            Terms::Columns => threads / 4 * self.stride(),
            Terms::Rows => threads / 128 * 8,
        };
        let place = |i| {
            format!(
                "        {name}_tile[{name}_place + {at}u] = halves_of({name}_{i}.xy);
        {name}_tile[{name}_place + {next}u] = halves_of({name}_{i}.zw);\n",
                at = i * step,
                next = i * step + 1,
            )
        };
        (0..self.loads()).map(place).collect()
    }

    /// Loads matrix `i` of the subgroup, for the terms from `term` on.
    fn matrix(&self, role: char, i: u32, term: u32) -> String {
        let (name, stride) = (self.name, self.stride());
        // `coopLoadT` reads by rows. An A has its terms in columns, a B in rows.
        let by_rows = (self.terms == Terms::Columns) == (role == 'A');
        let load = if by_rows { "coopLoadT" } else { "coopLoad" };
        let at = match self.terms {
            Terms::Columns => format!("({name}_side + {}u) * {stride}u + {}u", UNIT * i, term / 4),
            Terms::Rows => format!("{}u + {name}_side / 4u", term * stride + UNIT / 4 * i),
        };
        format!("            let {name}_m{i} = {load}<coop_mat16x16<f16, {role}>>(&{name}_tile[{at}], {stride}u);\n")
    }
}

impl Form {
    /// The source, with matrix operations as [`MatrixUnits::source`](crate::gpu::MatrixUnits)
    /// takes them.
    pub fn source(self) -> String {
        let Self { tile, adapted, fours, .. } = self;
        let threads = tile.threads();
        let operand = |name, memory, terms, side| Operand { name, memory, terms, side, threads };
        let left = operand("left", "left", self.left, tile.m);
        let right = operand("right", "right", self.right, tile.n);
        let multiply = multiply(&left, &right, tile);
        let (load, place) = ([left.load(), right.load()].concat(), [left.place(), right.place()].concat());
        let advance = [left.advance(), right.advance()].concat();
        let across = tile.n / tile.subgroup_n;
        let bindings = if adapted { ADAPTER } else { "" };
        let store = if fours { STORE_FOURS } else { STORE };
        let element = if fours { "vec4<f32>" } else { "f32" };
        let mut text = [DECLARATIONS, bindings, POWER, store].concat();
        let _ = write!(
            text,
            "
var<workgroup> left_tile: array<vec4<f16>, {}>;
var<workgroup> right_tile: array<vec4<f16>, {}>;
var<workgroup> block: array<{element}, {}>;
@group(0) @binding(5) var<storage, read_write> out: array<{element}>;

@compute @workgroup_size({threads})
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) thread: u32) {{
    let group = id.x + id.y * grid.x;
    if (group >= params.groups) {{
        return;
    }}
    let place = place_of(group, {}u, {}u);
    let subgroup = thread / {SUBGROUP}u;
    let left_side = subgroup / {across}u * {}u;
    let right_side = subgroup % {across}u * {}u;
    let first = place.chunk * params.chunk;
    let end = min(params.terms, first + params.chunk);
    var exponent = right_exponents[0];
    var ratio = 1.0;
",
            left.fours(),
            right.fours(),
            threads / SUBGROUP * UNIT * UNIT / if fours { 4 } else { 1 },
            tile.m,
            tile.n,
            tile.subgroup_m,
            tile.subgroup_n,
        );
        text += &[left.part(), right.part()].concat();
        text += &left.start("first", "place.row");
        text += &right.start("first", "place.column");
        units(tile).for_each(|(i, j)| {
            let _ = writeln!(text, "    var sums_{i}_{j}: coop_mat16x16<f32, C>;");
        });
        text += &format!("    {{\n{load}{advance}{place}{BARRIER}    }}\n");
        text += &format!("    for (var term = first + {WIDTH}u; term < end; term += {WIDTH}u) {{\n");
        text += &[load.as_str(), &advance, &multiply, BARRIER, &place, BARRIER].concat();
        text += &format!("    }}\n{multiply}");
        if adapted {
            let more = [Operand { memory: "low", ..left }, Operand { memory: "other", ..right }];
            text += &adapter(&more, tile, &[BARRIER, &place, BARRIER, &multiply].concat());
        }
        text += &stores(tile, fours);
        text + "}\n"
    }
}

const BARRIER: &str = "        workgroupBarrier();\n";

/// Adds the terms of an adapter to the sums of the first chunk. `rest` places the tiles and
/// multiplies them.
///
/// Its terms have another scale than the sums so far. These are brought to it. If the terms of the
/// adapter are smaller by more than 2^60, no float32 shows them.
fn adapter([left, right]: &[Operand; 2], tile: Tile, rest: &str) -> String {
    // Matrix operations are permitted in loops, but not after a condition of this kind.
    let mut text = "    let first_chunk = place.chunk == 0u;
    let shift = max(right_exponents[1] + right_exponents[2] - exponent, -60);
    let factor = select(1.0, power(-shift) / params.ratio, first_chunk);
    let rank = select(0u, params.rank, first_chunk);
    exponent += select(0, shift, first_chunk);
    ratio = select(1.0, params.ratio, first_chunk);
"
    .to_owned();
    units(tile).for_each(|(i, j)| {
        let _ = writeln!(text, "    sums_{i}_{j} = coopScale(sums_{i}_{j}, factor);");
    });
    text += &left.start("0u", "place.row");
    text += &right.start("0u", "place.column");
    text += &format!("    for (var term = 0u; term < rank; term += {WIDTH}u) {{\n");
    text += &[left.load(), right.load(), left.advance(), right.advance()].concat();
    text + rest + "    }\n"
}

/// The matrices of 16 x 16 sums of a subgroup.
fn units(tile: Tile) -> impl Iterator<Item = (u32, u32)> {
    let (rows, columns) = (tile.subgroup_m / UNIT, tile.subgroup_n / UNIT);
    (0..rows).flat_map(move |i| (0..columns).map(move |j| (i, j)))
}

/// Multiplies the tiles in workgroup memory.
fn multiply(left: &Operand, right: &Operand, tile: Tile) -> String {
    let mut text = String::new();
    for term in (0..WIDTH).step_by(UNIT as usize) {
        text += "        {\n";
        (0..tile.subgroup_m / UNIT).for_each(|i| text += &left.matrix('A', i, term));
        for j in 0..tile.subgroup_n / UNIT {
            text += &right.matrix('B', j, term);
            for i in 0..tile.subgroup_m / UNIT {
                let _ = writeln!(text, "            sums_{i}_{j} = coopMultiplyAdd(left_m{i}, right_m{j}, sums_{i}_{j});");
            }
        }
        text += "        }\n";
    }
    text
}

/// Stores the sums. The units write them to workgroup memory, and the threads from there.
fn stores(tile: Tile, fours: bool) -> String {
    let stride = if fours { UNIT / 4 } else { UNIT };
    let mut text = format!("    let block_first = subgroup * {}u;\n    let lane = thread % {SUBGROUP}u;\n", UNIT * stride);
    for (i, j) in units(tile) {
        let (row, column) = (UNIT * i, UNIT * j);
        let _ = write!(
            text,
            "    coopStoreT(sums_{i}_{j}, &block[block_first], {stride}u);
    workgroupBarrier();
    store_block(block_first, lane, place.row + left_side + {row}u, place.column + right_side + {column}u, place.chunk, exponent, ratio);
    workgroupBarrier();
"
        );
    }
    text
}

const DECLARATIONS: &str = "
struct Params {
    m: u32,
    n: u32,
    terms: u32,             // a multiple of 32
    chunk: u32,             // terms per workgroup: a multiple of 32
    groups: u32,            // workgroups with work
    left_first: u32,        // index of the 16 bytes that start with the first element
    left_rows: u32,         // rows of a panel, padded
    right_first: u32,
    right_rows: u32,
    left_exponent: u32,     // index of the exponent of the first row
    left_by_row: u32,       // 1 if the rows of the result have exponents
    out_first: u32,         // index of out[0, 0]
    out_row: u32,           // elements from out[i, j] to out[i + 1, j]
    out_chunk: u32,         // elements between the sums of adjacent chunks
    bias_first: u32,
    has_bias: u32,
    add: u32,               // 1 to add the product to `out`
    scale: f32,
    low_first: u32,         // adapter: index of the 16 bytes that start with the first row
    low_rows: u32,
    other_first: u32,       // 0
    other_rows: u32,
    rank: u32,              // adapter: its terms
    ratio: f32,             // adapter: the factor of its terms
}

@group(0) @binding(0) var<storage, read> left: array<vec4<u32>>;    // eight f16
@group(0) @binding(1) var<storage, read> right: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> left_exponents: array<i32>;
@group(0) @binding(3) var<storage, read> right_exponents: array<i32>;  // of `right`, and those of an adapter
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

struct Place {
    row: u32,
    column: u32,
    chunk: u32,
}

// The tile of a workgroup. Eight rows of tiles go together, so that their operands stay in a cache.
fn place_of(group: u32, tile_m: u32, tile_n: u32) -> Place {
    let rows = (params.m + tile_m - 1u) / tile_m;
    let columns = (params.n + tile_n - 1u) / tile_n;
    let tile = group % (rows * columns);
    let top = tile / (8u * columns) * 8u;
    let height = min(8u, rows - top);
    let inside = tile % (8u * columns);
    return Place((top + inside % height) * tile_m, inside / height * tile_n, group / (rows * columns));
}

// Adjacent rows of four threads each, in the order 0 4 1 5 2 6 3 7.
fn spread(row: u32) -> u32 {
    return (row & ~7u) | ((row & 1u) << 2u) | ((row >> 1u) & 3u);
}

fn halves_of(words: vec2<u32>) -> vec4<f16> {
    return vec4<f16>(vec2<f16>(unpack2x16float(words.x)), vec2<f16>(unpack2x16float(words.y)));
}
";

/// The operands of an adapter: x A^T [rows, rank] and B, or dy B and A.
const ADAPTER: &str = "
@group(0) @binding(6) var<storage, read> low: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read> other: array<vec4<u32>>;
";

/// The scales of both operands may lie far from 1, and their product near it. So the power of two
/// is applied in two steps.
const POWER: &str = "
fn power(e: i32) -> f32 {
    return bitcast<f32>(u32(clamp(e, -126, 127) + 127) << 23u);
}
";

/// Stores a block of 16 x 16 sums, 16 bytes at a time.
const STORE_FOURS: &str = "
fn store_block(first: u32, lane: u32, top: u32, left_column: u32, chunk: u32, exponent: i32, ratio: f32) {
    let column = left_column + lane % 4u * 4u;
    for (var i = 0u; i < 16u; i += 8u) {
        let row = top + i + lane / 4u;
        if (row < params.m && column < params.n) {
            var e = exponent;
            if (params.left_by_row == 1u) { e += left_exponents[params.left_exponent + row]; }
            var value = block[first + i * 4u + lane] * power(e >> 1u) * power(e - (e >> 1u)) * ratio;
            if (params.has_bias == 1u) {
                let b = params.bias_first + column;
                value += vec4(bias[b], bias[b + 1u], bias[b + 2u], bias[b + 3u]);
            }
            value *= params.scale;
            let at = (params.out_first + chunk * params.out_chunk + row * params.out_row + column) / 4u;
            if (params.add == 1u) { value += out[at]; }
            out[at] = value;
        }
    }
}
";

/// Stores a block of 16 x 16 sums, one by one.
const STORE: &str = "
fn store_block(first: u32, lane: u32, top: u32, left_column: u32, chunk: u32, exponent: i32, ratio: f32) {
    let column = left_column + lane % 16u;
    for (var i = 0u; i < 16u; i += 2u) {
        let row = top + i + lane / 16u;
        if (row < params.m && column < params.n) {
            var e = exponent;
            if (params.left_by_row == 1u) { e += left_exponents[params.left_exponent + row]; }
            var value = block[first + i * 16u + lane] * power(e >> 1u) * power(e - (e >> 1u)) * ratio;
            if (params.has_bias == 1u) { value += bias[params.bias_first + column]; }
            value *= params.scale;
            let at = params.out_first + chunk * params.out_chunk + row * params.out_row + column;
            if (params.add == 1u) { value += out[at]; }
            out[at] = value;
        }
    }
}
";
