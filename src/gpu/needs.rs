//! The requirements of a kernel on the device and on its bindings. They are read from the WGSL
//! before the driver compiles it: naga does not check workgroup memory against the device limit,
//! and some drivers hang on too much of it.

use wgpu::naga::back::pipeline_constants::process_overrides;
use wgpu::naga::proc::Layouter;
use wgpu::naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use wgpu::naga::{AddressSpace, Module, ShaderStage, StorageAccess, front::wgsl};

use super::error::GpuError;
use super::shader::KernelSpec;

/// Bind group of the buffers, and bind group of the uniform parameters (binding 0).
pub(super) const BUFFERS_GROUP: u32 = 0;
pub(super) const PARAMS_GROUP: u32 = 1;

/// Requirements of one entry point with its constants.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    pub(super) workgroup_size: [u32; 3],
    pub(super) workgroup_bytes: u64,
    /// Bindings of group 0 that the entry point uses.
    pub(super) buffers: Vec<Bound>,
    /// Number of bindings in group 0 of the module: the highest binding plus 1.
    pub(super) declared: usize,
    /// The uniform parameters, at group 1, binding 0.
    pub(super) params: Option<Bound>,
}

/// A buffer that a kernel uses.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Bound {
    pub(super) binding: u32,
    /// Minimum size in bytes. A runtime-sized array counts as one element.
    pub(super) min_size: u64,
    pub(super) uniform: bool,
    /// Whether the entry point may write it.
    pub(super) writable: bool,
}

impl Needs {
    /// Reads the WGSL of a kernel.
    pub(super) fn of(kernel: &str, spec: &KernelSpec) -> Result<Self, GpuError> {
        let invalid = |reason: String| GpuError::invalid(format!("kernel {kernel}"), reason);
        let source = spec.shader.source.as_ref();
        let module = wgsl::parse_str(source).map_err(|e| invalid(e.emit_to_string(source)))?;
        let info = Validator::new(ValidationFlags::all(), Capabilities::all())
            .validate(&module)
            .map_err(|e| invalid(e.emit_to_string(source)))?;
        let entry = Some((ShaderStage::Compute, spec.entry));
        if !module.entry_points.iter().any(|e| (e.stage, e.name.as_str()) == (ShaderStage::Compute, spec.entry)) {
            return Err(invalid(format!("there is no compute entry point {}", spec.entry)));
        }
        let constants = spec.constants.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
        let declared = bindings(&module, BUFFERS_GROUP).max().map_or(0, |highest| highest as usize + 1);
        let (module, info) = process_overrides(&module, &info, entry, &constants).map_err(|e| invalid(e.to_string()))?;
        Self::of_entry(&module, &info, spec.entry, declared).map_err(invalid)
    }

    fn of_entry(module: &Module, info: &ModuleInfo, name: &str, declared: usize) -> Result<Self, String> {
        let mut layouter = Layouter::default();
        layouter.update(module.to_ctx()).map_err(|e| e.to_string())?;
        let entries = &mut module.entry_points.iter().enumerate();
        let (at, entry) = entries.find(|(_, e)| e.name == name).ok_or("the entry point is lost")?;
        let mut needs = Self { workgroup_size: entry.workgroup_size, declared, ..Self::default() };
        let used = info.get_entry_point(at);
        for (_, variable) in module.global_variables.iter().filter(|(handle, _)| !used[*handle].is_empty()) {
            let size = u64::from(layouter[variable.ty].size);
            if variable.space == AddressSpace::WorkGroup {
                // WebGPU counts each variable in units of 16 bytes.
                needs.workgroup_bytes += size.next_multiple_of(16);
            }
            let Some(at) = &variable.binding else { continue };
            let uniform = variable.space == AddressSpace::Uniform;
            let bound = Bound {
                binding: at.binding,
                min_size: size,
                uniform,
                writable: matches!(variable.space, AddressSpace::Storage { access } if access.contains(StorageAccess::STORE)),
            };
            let buffer = uniform || matches!(variable.space, AddressSpace::Storage { .. });
            match (at.group, at.binding) {
                (BUFFERS_GROUP, _) if buffer => needs.buffers.push(bound),
                (PARAMS_GROUP, 0) if uniform => needs.params = Some(bound),
                (group, binding) => return Err(format!("no dispatch binds @group({group}) @binding({binding})")),
            }
        }
        needs.buffers.sort_by_key(|bound| bound.binding);
        Ok(needs)
    }

    /// Checks the requirements against the limits of a device.
    pub(super) fn check(&self, kernel: &str, limits: &wgpu::Limits) -> Result<(), GpuError> {
        let [x, y, z] = self.workgroup_size.map(u64::from);
        let storage = self.buffers.iter().filter(|bound| !bound.uniform).count() as u64;
        let table = [
            (self.workgroup_bytes, limits.max_compute_workgroup_storage_size, "maxComputeWorkgroupStorageSize"),
            (x, limits.max_compute_workgroup_size_x, "maxComputeWorkgroupSizeX"),
            (y, limits.max_compute_workgroup_size_y, "maxComputeWorkgroupSizeY"),
            (z, limits.max_compute_workgroup_size_z, "maxComputeWorkgroupSizeZ"),
            (
                x.saturating_mul(y).saturating_mul(z),
                limits.max_compute_invocations_per_workgroup,
                "maxComputeInvocationsPerWorkgroup",
            ),
            (storage, limits.max_storage_buffers_per_shader_stage, "maxStorageBuffersPerShaderStage"),
        ];
        match table.into_iter().find(|&(needed, limit, _)| needed > u64::from(limit)) {
            None => Ok(()),
            Some((needed, limit, limit_name)) => {
                Err(GpuError::KernelLimit { kernel: kernel.to_owned(), needed, limit: limit.into(), limit_name })
            }
        }
    }
}

fn bindings(module: &Module, group: u32) -> impl Iterator<Item = u32> {
    module.global_variables.iter().filter_map(move |(_, v)| v.binding.filter(|b| b.group == group)).map(|b| b.binding)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Shader;

    const SOURCE: &str = "
        struct Params { count: u32, scale: f32, pad: vec2<u32> }
        override TILE: u32 = 4;
        var<workgroup> tile: array<vec4<f32>, TILE * 2>;
        var<workgroup> flag: atomic<u32>;
        var<workgroup> other: array<u32, 5>;
        @group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;
        @group(0) @binding(1) var<uniform> table: array<vec4<f32>, 16>;
        @group(0) @binding(0) var<storage, read> codes: array<u32>;
        @group(1) @binding(0) var<uniform> params: Params;
        fn helper(i: u32) { tile[i] = vec4(params.scale); }
        @compute @workgroup_size(TILE, 2) fn tiled(@builtin(local_invocation_index) i: u32) {
            helper(i);
            atomicAdd(&flag, codes[i]);
            workgroupBarrier();
            out[i] = tile[i] + table[i % 16];
        }
        @compute @workgroup_size(5) fn plain(@builtin(local_invocation_index) i: u32) { other[i] = i; }";

    fn needs(entry: &'static str, constants: Vec<(&'static str, f64)>) -> Result<Needs, GpuError> {
        Needs::of("test", &KernelSpec { shader: Shader::checked("test", SOURCE), entry, constants })
    }

    #[test]
    fn an_entry_point_needs_what_it_reaches() {
        let bound = |binding, min_size, uniform| Bound { binding, min_size, uniform, writable: binding == 3 };
        let tiled = |tile| Needs {
            workgroup_size: [tile, 2, 1],
            workgroup_bytes: u64::from(tile) * 32 + 16,
            buffers: vec![bound(0, 4, false), bound(1, 256, true), bound(3, 16, false)],
            declared: 4,
            params: Some(bound(0, 16, true)),
        };
        assert_eq!(needs("tiled", vec![]).unwrap(), tiled(4));
        assert_eq!(needs("tiled", vec![("TILE", 7.0)]).unwrap(), tiled(7));
        let plain = Needs { workgroup_size: [5, 1, 1], workgroup_bytes: 32, declared: 4, ..Needs::default() };
        assert_eq!(needs("plain", vec![]).unwrap(), plain);
        assert!(matches!(needs("absent", vec![]), Err(GpuError::Invalid { .. })));
        assert!(matches!(needs("plain", vec![("TILES", 7.0)]), Err(GpuError::Invalid { .. })));
    }

    #[test]
    fn each_limit_is_named() {
        let limits = wgpu::Limits::default();
        let check = |workgroup_size, workgroup_bytes, buffers: u32| {
            let bound = |binding| Bound { binding, min_size: 4, uniform: false, writable: false };
            let buffers = (0..buffers).map(bound).collect();
            match (Needs { workgroup_size, workgroup_bytes, buffers, ..Needs::default() }).check("test", &limits) {
                Ok(()) => "",
                Err(GpuError::KernelLimit { limit_name, .. }) => limit_name,
                Err(e) => panic!("{e}"),
            }
        };
        assert_eq!(check([256, 1, 1], 16384, 8), "");
        assert_eq!(check([1, 1, 1], 16400, 0), "maxComputeWorkgroupStorageSize");
        assert_eq!(check([257, 1, 1], 0, 0), "maxComputeWorkgroupSizeX");
        assert_eq!(check([1, 257, 1], 0, 0), "maxComputeWorkgroupSizeY");
        assert_eq!(check([1, 1, 65], 0, 0), "maxComputeWorkgroupSizeZ");
        assert_eq!(check([128, 1, 4], 0, 0), "maxComputeInvocationsPerWorkgroup");
        assert_eq!(check([u32::MAX; 3], 0, 0), "maxComputeWorkgroupSizeX");
        assert_eq!(check([1, 1, 1], 0, 9), "maxStorageBuffersPerShaderStage");
    }
}
