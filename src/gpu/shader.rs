//! Shaders and the specifications of kernels: what a kernel is compiled from.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use std::borrow::Cow;

/// WGSL, and whether it runs without the runtime checks of wgpu.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shader {
    pub(super) name: Cow<'static, str>,
    pub(super) source: Cow<'static, str>,
    pub(super) trusted: bool,
}

impl Shader {
    /// A shader with bounds checks on every access.
    pub fn checked(name: impl Into<Cow<'static, str>>, source: impl Into<Cow<'static, str>>) -> Self {
        Self { name: name.into(), source: source.into(), trusted: false }
    }

    /// A shader without runtime checks. `NF4PACK_CHECKED=1` turns them on.
    ///
    /// # Safety
    /// The caller must prove for every dispatch: each access lies in the bound ranges, all loops
    /// end, and workgroup memory is written before it is read.
    pub unsafe fn trusted(name: impl Into<Cow<'static, str>>, source: impl Into<Cow<'static, str>>) -> Self {
        Self { name: name.into(), source: source.into(), trusted: true }
    }
}

/// The parts of a kernel: shader, entry point and constants.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelSpec {
    /// The shader.
    pub shader: Shader,
    /// The entry point.
    pub entry: &'static str,
    /// Values of `override` constants.
    pub constants: Vec<(&'static str, f64)>,
}

impl std::hash::Hash for KernelSpec {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (&self.shader, self.entry).hash(state);
        self.constants.iter().for_each(|(name, value)| (name, value.to_bits()).hash(state));
    }
}

#[cfg(all(test, feature = "train"))]
impl KernelSpec {
    /// The same kernel with `from` replaced by `to` in its shader, and with runtime checks.
    pub(crate) fn patched(self, from: &str, to: &str) -> Self {
        let source = self.shader.source.replace(from, to);
        Self { shader: Shader::checked(self.shader.name, source), ..self }
    }
}
