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
//! - `c = coopMultiplyAdd(a, b, c)`, before the memory of its B is written again
//! - `c = coopScale(c, factor)`, a C times a number, with two names as arguments
//! - `var c: coop_mat16x16<f32, C>;`, a C of zeros
//! - one entry point per module, with the parameter `@builtin(local_invocation_index)`
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

mod loops;

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
            Self::Loops => loops::source(source, SUBGROUP),
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
