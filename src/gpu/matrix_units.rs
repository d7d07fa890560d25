//! Matrix units: whether a device has them, and WGSL that uses them.
//!
//! A kernel multiplies 16 x 16 matrices that the 32 threads of a subgroup hold together
//! ("cooperative matrices"). Its source uses the extension as naga knows it. Devices without matrix
//! units, such as software drivers, run the same source with the matrix operations as loops
//! ([`MatrixUnits::Loops`]). So tests without such a device see every index, edge and scale of a
//! kernel.
//!
//! The sources keep to this part of the language:
//!
//! - types `coop_mat16x16<f16, A>`, `coop_mat16x16<f16, B>` and `coop_mat16x16<f32, C>`
//! - `coopLoad` (by columns) and `coopLoadT` (by rows) of a matrix of one of these types, and
//!   `coopStore` and `coopStoreT` of a C, with a pointer `&array[index]` into an array of a module;
//!   the stride counts elements of the array
//! - `coopMultiplyAdd`, before the memory of its B is written again
//! - `coopScale(c, factor)`, a C times a number, with two names as arguments
//! - one entry point per module, with the parameter `@builtin(local_invocation_index)`

use std::collections::BTreeSet;
use std::fmt::Write as _;

/// How the matrix operations of a kernel run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MatrixUnits {
    /// On the matrix units of the device.
    Hardware,
    /// As loops, in float32: slow, for tests.
    Loops,
}

/// The use of matrix units, in [`Options`](super::Options).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UseMatrixUnits {
    /// Where the device has them.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Loops in their place, on any device with SHADER_F16.
    Loops,
}

/// Threads of a subgroup: kernels count them from the local index.
const SUBGROUP: u32 = 32;
/// Workgroup memory of a kernel.
const WORKGROUP_BYTES: u32 = 24 << 10;

/// The features of [`MatrixUnits::Hardware`].
pub(super) fn features() -> wgpu::Features {
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16
}

/// The token with which wgpu enables the extension.
pub(super) fn experimental(features: wgpu::Features) -> wgpu::ExperimentalFeatures {
    match features.intersects(wgpu::Features::all_experimental_mask()) {
        // SAFETY: only `Shader::trusted` sources use the extension, and their authors have proven
        // all accesses. Each kernel is compared with the CPU before its first use on a driver.
        true => unsafe { wgpu::ExperimentalFeatures::enabled() },
        false => wgpu::ExperimentalFeatures::disabled(),
    }
}

/// The reason why the matrix units of an adapter are not used, if there is one.
pub(super) fn obstacle(adapter: &wgpu::Adapter) -> Option<String> {
    let (missing, info, limits) = (features() - adapter.features(), adapter.get_info(), adapter.limits());
    let f16_f32 = |found: &wgpu::CooperativeMatrixProperties| {
        let sizes = [found.m_size, found.n_size, found.k_size];
        let types = (found.ab_type, found.cr_type);
        sizes == [16; 3] && types == (wgpu::CooperativeScalarType::F16, wgpu::CooperativeScalarType::F32)
    };
    if !missing.is_empty() {
        let names: Vec<&str> = missing.iter_names().map(|(name, _)| name).collect();
        return Some(format!("the driver does not offer {}", names.join(" and ")));
    }
    if !adapter.cooperative_matrix_properties().iter().any(f16_f32) {
        return Some("the driver offers no products of 16 x 16 x 16 with f16 operands and f32 sums".to_owned());
    }
    if (info.subgroup_min_size, info.subgroup_max_size) != (SUBGROUP, SUBGROUP) {
        let (min, max) = (info.subgroup_min_size, info.subgroup_max_size);
        return Some(format!("subgroups have {min} to {max} threads instead of {SUBGROUP}"));
    }
    let found = limits.max_compute_workgroup_storage_size;
    (found < WORKGROUP_BYTES).then(|| format!("workgroups have {found} bytes of memory, less than {WORKGROUP_BYTES}"))
}

/// Decides how kernels for matrix units run.
pub(super) fn decide(wanted: UseMatrixUnits, adapter: &wgpu::Adapter) -> Result<MatrixUnits, String> {
    match wanted {
        UseMatrixUnits::Off => Err("matrix units are switched off".to_owned()),
        UseMatrixUnits::Auto => obstacle(adapter).map_or(Ok(MatrixUnits::Hardware), Err),
        UseMatrixUnits::Loops if adapter.features().contains(wgpu::Features::SHADER_F16) => Ok(MatrixUnits::Loops),
        UseMatrixUnits::Loops => Err("the driver does not offer SHADER_F16".to_owned()),
    }
}

impl MatrixUnits {
    /// The name of the precision with or without matrix units, as `--precision` takes it.
    pub const fn precision(units: Option<Self>) -> &'static str {
        if units.is_some() { "mixed" } else { "f32" }
    }

    /// The source as the device runs it. `source` is written as the module describes, without
    /// `enable` directives.
    pub fn source(self, source: &str) -> String {
        match self {
            Self::Hardware => format!("enable f16;\nenable wgpu_cooperative_matrix;\n{}", with_products(source)),
            Self::Loops => as_loops(source),
        }
    }
}

/// The source with `coopScale(c, factor)` as `(c * factor)`.
fn with_products(source: &str) -> String {
    let mut parts = source.split(SCALE);
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text += "(";
        text += &part.replacen(", ", " * ", 1);
    }
    text
}

const SCALE: &str = "coopScale(";

/// The source with the matrix operations as loops.
///
/// Thread `lane` of a subgroup holds row `lane / 2` of A, and columns `lane % 2 * 8 ..` of that row
/// of C.
fn as_loops(source: &str) -> String {
    let mut functions = BTreeSet::new();
    let mut body = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("coop") {
        body.push_str(&rest[..at]);
        let call = Call::parse(&rest[at..]);
        match &call {
            Some(call) => {
                functions.insert((call.kind, call.array));
                let _ = write!(body, "{}_{}({}", call.kind.name(), call.array, call.arguments);
            }
            None => body.push_str("coop"),
        }
        rest = &rest[at + call.map_or("coop".len(), |call| call.length)..];
    }
    body.push_str(rest);
    for (from, to) in TYPES {
        body = body.replace(from, to);
    }
    let numbered = || functions.iter().enumerate();
    let accesses: String =
        numbered().map(|(number, &(kind, array))| kind.function(array, width(source, array), number)).collect();
    let elements: String =
        numbered().map(|(number, &(kind, array))| kind.element_of_b(array, width(source, array), number)).collect();
    let loops = LOOPS.replace("ELEMENTS", &elements);
    format!("enable f16;\n{loops}\n{accesses}\n{}", set_lane(&body))
}

const TYPES: [(&str, &str); 5] = [
    ("coop_mat16x16<f16, A>", "CoopA"),
    ("coop_mat16x16<f16, B>", "CoopB"),
    ("coop_mat16x16<f32, C>", "CoopC"),
    ("coopMultiplyAdd(", "coop_multiply_add("),
    (SCALE, "coop_scale("),
];

/// The types, and the product. A software driver compiles a copy of these functions for each call,
/// so they are short: B stays in its array until the product, and loops end at variables, so that
/// the driver does not unroll them.
const LOOPS: &str = "
struct CoopA { row: array<f32, 16> }
struct CoopB { index: u32, stride: u32, access: u32 }
struct CoopC { sums: array<f32, 8> }
var<private> coop_lane: u32;
var<private> coop_8: u32;
var<private> coop_16: u32;
fn coop_b(b: CoopB, i: u32, j: u32) -> f32 {
    switch b.access {
        ELEMENTS
        default: { return 0.0; }
    }
}
fn coop_multiply_add(a_: CoopA, b: CoopB, c_: CoopC) -> CoopC {
    var a = a_;
    var c = c_;
    for (var k = 0u; k < coop_16; k++) {
        for (var j = 0u; j < coop_8; j++) { c.sums[j] += a.row[k] * coop_b(b, k, coop_lane % 2u * 8u + j); }
    }
    return c;
}
fn coop_scale(c_: CoopC, factor: f32) -> CoopC {
    var c = c_;
    for (var j = 0u; j < coop_8; j++) { c.sums[j] *= factor; }
    return c;
}";

/// An access to an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Access {
    Load { role: char, by_rows: bool },
    Store { by_rows: bool },
}

/// A call in the source: `coopLoad<..>(&array[index], ..)` or `coopStore(c, &array[index], ..)`.
#[derive(Debug)]
struct Call<'a> {
    kind: Access,
    array: &'a str,
    /// The arguments up to the index, without its closing bracket.
    arguments: String,
    /// Bytes of the source that they replace, up to the closing bracket.
    length: usize,
}

impl<'a> Call<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let name_end = text.find(['<', '('])?;
        let by_rows = text[..name_end].ends_with('T');
        let (kind, arguments) = match text[..name_end].trim_end_matches('T') {
            "coopLoad" => {
                let role_at = text.find(", ")? + 2;
                let role = text[role_at..].chars().next()?.to_ascii_lowercase();
                (Access::Load { role, by_rows }, text[role_at..].find('(')? + role_at + 1)
            }
            "coopStore" => (Access::Store { by_rows }, name_end + 1),
            _ => return None,
        };
        let pointer = text[arguments..].find('&')? + arguments;
        let bracket = text[pointer..].find('[')? + pointer;
        let end = closing(&text[bracket..])? + bracket;
        let (before, index) = (&text[arguments..pointer], &text[bracket + 1..end]);
        Some(Self { kind, array: &text[pointer + 1..bracket], arguments: format!("{before}{index}"), length: end + 1 })
    }
}

/// The place of the bracket that closes the first one.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    text.find(|c: char| {
        depth += i32::from(c == '[') - i32::from(c == ']');
        depth == 0
    })
}

/// Scalars in an element of an array: `array<vec4<..>` or `array<..`.
fn width(source: &str, array: &str) -> u32 {
    let declared = format!(" {array}: array<vec4<");
    if source.contains(&declared) { 4 } else { 1 }
}

/// Sets the lane and the lengths of loops at the start of the entry point.
fn set_lane(source: &str) -> String {
    const INDEX: &str = "@builtin(local_invocation_index) ";
    let Some(at) = source.find(INDEX) else { return source.to_owned() };
    let name: String = source[at + INDEX.len()..].chars().take_while(|c| *c != ':').collect();
    let Some(brace) = source[at..].find('{').map(|brace| at + brace + 1) else { return source.to_owned() };
    let (head, tail) = source.split_at(brace);
    // The compiler does not know that this is 0.
    let zero = format!("u32(0.5 * fract(0.1 * f32({name})))");
    format!("{head}\n  coop_lane = {name} % {SUBGROUP}u;\n  coop_8 = 8u + {zero};\n  coop_16 = 16u + {zero};{tail}")
}

impl Access {
    fn name(self) -> String {
        let order = |by_rows| if by_rows { "rows" } else { "columns" };
        match self {
            Self::Load { role, by_rows } => format!("coop_load_{role}_{}", order(by_rows)),
            Self::Store { by_rows } => format!("coop_store_{}", order(by_rows)),
        }
    }

    /// Element (i, j) of a matrix at `index` of an array whose elements have `width` scalars.
    fn element(self, array: &str, width: u32, index: &str, stride: &str) -> String {
        let by_rows = matches!(self, Self::Load { by_rows: true, .. } | Self::Store { by_rows: true });
        let (row, column) = if by_rows { ("i", "j") } else { ("j", "i") };
        let at = format!("{row} * {stride} * {width}u + {column}");
        match width {
            1 => format!("{array}[{index} + {at}]"),
            _ => format!("{array}[{index} + ({at}) / 4u][({at}) % 4u]"),
        }
    }

    /// The function of this access, which has this number among all.
    fn function(self, array: &str, width: u32, number: usize) -> String {
        let element = self.element(array, width, "index", "stride");
        let name = format!("{}_{array}", self.name());
        match self {
            Self::Load { role: 'a', .. } => format!(
                "fn {name}(index: u32, stride: u32) -> CoopA {{\n  var a: CoopA;\n  let i = coop_lane / 2u;\n  \
                 for (var j = 0u; j < coop_16; j++) {{ a.row[j] = f32({element}); }}\n  return a;\n}}\n"
            ),
            Self::Load { role: 'b', .. } => {
                format!("fn {name}(index: u32, stride: u32) -> CoopB {{ return CoopB(index, stride, {number}u); }}\n")
            }
            Self::Load { .. } => format!(
                "fn {name}(index: u32, stride: u32) -> CoopC {{\n  var c: CoopC;\n  let i = coop_lane / 2u;\n  let first = \
                 coop_lane % 2u * 8u;\n  for (var n = 0u; n < coop_8; n++) {{ let j = first + n; c.sums[n] = \
                 f32({element}); }}\n  return c;\n}}\n"
            ),
            Self::Store { .. } => format!(
                "fn {name}(c_: CoopC, index: u32, stride: u32) {{\n  var c = c_;\n  let i = coop_lane / 2u;\n  let first = \
                 coop_lane % 2u * 8u;\n  for (var n = 0u; n < coop_8; n++) {{ let j = first + n; {element} = c.sums[n]; \
                 }}\n}}\n"
            ),
        }
    }

    /// The case of this access in `coop_b`. Empty for other matrices.
    fn element_of_b(self, array: &str, width: u32, number: usize) -> String {
        match self {
            Self::Load { role: 'b', .. } => {
                let element = self.element(array, width, "b.index", "b.stride");
                format!("case {number}u: {{ return f32({element}); }}\n        ")
            }
            _ => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;
    use crate::gpu::{BufferRange, Gpu, GpuError, KernelSpec, Options, Shader};

    /// A device, or `None` without one, unless `NF4PACK_REQUIRE_GPU=1`.
    fn open(matrix_units: UseMatrixUnits) -> Option<Gpu> {
        match Gpu::open(&Options { matrix_units, cache: None, ..Options::from_env() }) {
            Err(GpuError::NoAdapter) if std::env::var_os("NF4PACK_REQUIRE_GPU").is_none_or(|v| v != "1") => None,
            opened => Some(opened.unwrap()),
        }
    }

    /// One product of 16 x 16 matrices: each operand and the sums by rows and by columns, vectors
    /// and scalars.
    const SOURCE: &str = "
        @group(0) @binding(0) var<storage, read> input: array<f32>;
        @group(0) @binding(1) var<storage, read_write> out: array<f32>;
        var<workgroup> left: array<vec4<f16>, 160>;
        var<workgroup> right: array<f16, 640>;
        var<workgroup> sums: array<vec4<f32>, 160>;
        @compute @workgroup_size(32) fn main(@builtin(local_invocation_index) t: u32) {
            for (var i = t; i < 256u; i += 32u) {
                left[(i / 16u) * 6u + (i % 16u) / 4u][i % 4u] = f16(input[i]);
                right[(i / 16u) * 24u + i % 16u] = f16(input[256u + i]);
                sums[(i / 16u) * 6u + (i % 16u) / 4u][i % 4u] = input[512u + i];
            }
            workgroupBarrier();
            let stride = 6u;
            let start = 0u;
            let a_rows = coopLoadT<coop_mat16x16<f16, A>>(&left[start], stride);
            let a_columns = coopLoad<coop_mat16x16<f16, A>>(&left[start], stride);
            let b_rows = coopLoadT<coop_mat16x16<f16, B>>(&right[0], 24u);
            let b_columns = coopLoad<coop_mat16x16<f16, B>>(&right[0], 24u);
            var c = coopLoadT<coop_mat16x16<f32, C>>(&sums[start], stride);
            c = coopMultiplyAdd(a_rows, b_rows, c);
            c = coopMultiplyAdd(a_columns, b_columns, c);
            let factor = 0.5;
            c = coopScale(c, factor);
            coopStoreT(c, &out[start], 16u);
            let second = 256u;
            coopStore(c, &out[second], 16u);
        }";

    fn product(gpu: &Gpu, units: MatrixUnits, input: &[f32]) -> Vec<f32> {
        // SAFETY: one workgroup, which reads 768 and writes 512 elements, as many as are bound.
        let shader = unsafe { Shader::trusted("matrix units", units.source(SOURCE)) };
        let kernel = gpu.kernel(&KernelSpec { shader, entry: "main", constants: Vec::new() }).unwrap();
        let bound = BufferRange::whole(gpu.storage_with("input", bytemuck::cast_slice(input)).unwrap());
        let out = BufferRange::whole(gpu.storage("out", 2048).unwrap());
        let mut commands = gpu.commands("matrix units");
        commands.dispatch(&kernel, &[bound, out.clone()], &[], [1, 1, 1], 0);
        commands.submit().unwrap();
        let mut found = vec![0.0; 512];
        gpu.read_into(&out, bytemuck::cast_slice_mut(&mut found)).unwrap();
        found
    }

    /// Small integers: every product and sum is exact.
    fn input() -> Vec<f32> {
        (0..768_u32).map(|i| ((i * 37 + i / 16 * 11) % 23) as f32 - 11.0).collect()
    }

    fn expected(input: &[f32]) -> Vec<f32> {
        let at = |matrix: usize, i: usize, j: usize| input[256 * matrix + 16 * i + j];
        let sum = |i, j| {
            let terms = (0..16).map(|k| at(0, i, k) * at(1, k, j) + at(0, k, i) * at(1, j, k));
            0.5 * (at(2, i, j) + terms.sum::<f32>())
        };
        let rows = (0..256).map(|n| sum(n / 16, n % 16));
        rows.chain((0..256).map(|n| sum(n % 16, n / 16))).collect()
    }

    #[test]
    fn loops_and_hardware_multiply_as_the_cpu_does() {
        let Some(gpu) = open(UseMatrixUnits::Auto) else { return };
        assert_eq!(product(&gpu, MatrixUnits::Loops, &input()), expected(&input()));
        if gpu.matrix_units() == Ok(MatrixUnits::Hardware) {
            assert_eq!(product(&gpu, MatrixUnits::Hardware, &input()), expected(&input()));
        }
    }

    #[test]
    fn the_source_for_hardware_is_valid() {
        let shader = Shader::checked("matrix units", MatrixUnits::Hardware.source(SOURCE));
        let spec = KernelSpec { shader, entry: "main", constants: Vec::new() };
        let needs = super::super::needs::Needs::of("matrix units", &spec).unwrap();
        assert_eq!(needs.workgroup_bytes, 160 * 8 + 1280 + 160 * 16);
    }

    #[test]
    fn a_device_without_matrix_units_names_the_reason() {
        let Some(gpu) = open(UseMatrixUnits::Off) else { return };
        assert_eq!(gpu.matrix_units(), Err("matrix units are switched off"));
        assert_eq!(open(UseMatrixUnits::Loops).unwrap().matrix_units(), Ok(MatrixUnits::Loops));
    }
}
