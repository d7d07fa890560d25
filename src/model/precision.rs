//! The precision in which a model runs on a device: mixed, if every kernel on matrix units that the
//! model uses gives the values of the CPU, else float32.

use crate::arch::config::ModelConfig;
use crate::arch::family::Activation;
use crate::format::{FloatType, Index};
use crate::gpu::{Gpu, KernelSpec, MatrixUnits, Options};
use crate::lora::adapter::Adapter;
use crate::lora::config::{TARGETS, projection_shape};
use crate::ops::matmul::{PackedGlu, PackedHalves, PackedNorm, ProductKernels, Stored};
use crate::ops::mixed_test::{self, MixedTest, reason};
use crate::ops::{Attention, OpError};

/// Head sizes of the families.
const HEAD_DIMS: [u32; 5] = [64, 80, 96, 128, 256];

/// The kernels on matrix units that a model uses.
#[derive(Debug, Clone)]
pub struct MixedKernels {
    products: ProductKernels,
    head_dims: Vec<u32>,
    activations: Vec<Activation>,
    /// A text replacement in the shaders of attention, norms and activations, for tests.
    #[cfg(test)]
    patch: Option<[&'static str; 2]>,
}

impl MixedKernels {
    /// The kernels of `model`, the model of a pack with this index. `rank` is that of the adapter,
    /// 0 without one.
    pub fn new(index: &Index, model: &ModelConfig, rank: u32, training: bool) -> Self {
        let mut products = ProductKernels::default();
        for (_, section) in index.tensors() {
            if let (Some(stored), [outputs, inputs]) = (Stored::of(section), section.shape.dims()) {
                let [outputs, inputs] = [outputs, inputs].map(|&side| u32::try_from(side).unwrap_or(u32::MAX));
                products.add_weight(stored, outputs, inputs);
            }
        }
        for (inputs, outputs) in TARGETS.iter().filter(|_| rank > 0).filter_map(|&role| projection_shape(model, role)) {
            products.add_adapter(rank, outputs, inputs);
        }
        products.add_products(training);
        Self::of(products, vec![model.head_dim], vec![model.family.activation])
    }

    /// As [`MixedKernels::new`], to run a model without training.
    pub fn without_training(index: &Index, model: &ModelConfig, adapter: Option<&Adapter>) -> Self {
        Self::new(index, model, adapter.map_or(0, |adapter| adapter.config.rank), false)
    }

    /// The kernels of all models with heads of this size, or of the sizes of all families.
    pub fn all(head_dim: Option<u32>) -> Self {
        let head_dims = head_dim.map_or_else(|| HEAD_DIMS.into(), |head_dim| vec![head_dim]);
        Self::of(ProductKernels::all(), head_dims, vec![Activation::Silu, Activation::GeluTanh])
    }

    /// With the kernels for a model of the same shapes whose weights are floats of this type, too.
    #[must_use]
    pub fn and_raw(mut self, float_type: FloatType) -> Self {
        self.products.add_any_weight(Stored::Raw(float_type));
        self
    }

    fn of(products: ProductKernels, head_dims: Vec<u32>, activations: Vec<Activation>) -> Self {
        Self {
            products,
            head_dims,
            activations,
            #[cfg(test)]
            patch: None,
        }
    }

    /// Broken kernels, for tests.
    #[cfg(test)]
    pub fn patched(self, patch: [&'static str; 2]) -> Self {
        Self { products: self.products.patched(patch), patch: Some(patch), ..self }
    }

    /// The tests of the kernels.
    ///
    /// # Errors
    /// [`OpError::Gpu`] if memory is exhausted.
    pub fn tests<'a>(&self, gpu: &'a Gpu, units: MatrixUnits) -> Result<Vec<MixedTest<'a>>, OpError> {
        #[cfg(test)]
        let patch = self.patch;
        let change = move |spec: KernelSpec| {
            #[cfg(test)]
            let spec = patch.iter().fold(spec, |spec, [from, to]| spec.patched(from, to));
            spec
        };
        let attention = |&head_dim: &u32| Attention::mixed_test(gpu, head_dim, units, change);
        let mut tests = self.products.tests(gpu, units)?;
        tests.extend(self.head_dims.iter().filter_map(attention));
        tests.extend([PackedNorm::mixed_test(gpu, change), PackedHalves::mixed_test(gpu, change)]);
        tests.extend(self.activations.iter().map(|&activation| PackedGlu::mixed_test(gpu, activation, change)));
        Ok(tests)
    }

    /// Tests the kernels, except those that passed in an earlier run on this driver.
    ///
    /// # Errors
    /// The error of the first kernel that fails; any device error.
    pub fn check(&self, gpu: &Gpu) -> Result<(), OpError> {
        let Ok(units) = gpu.matrix_units() else { return Ok(()) };
        let untested = |test: &&MixedTest<'_>| test.kept() != Some(Ok(()));
        let tests = self.tests(gpu, units)?;
        let untested: Vec<_> = tests.iter().filter(untested).collect();
        mixed_test::compile(untested.iter().copied());
        untested.iter().try_for_each(|test| test.run(gpu))
    }

    /// `gpu`, opened with `options`, if no kernel fails on this driver, now or in an earlier run;
    /// else the same device in float32, with the reason in [`Gpu::matrix_units`].
    ///
    /// # Errors
    /// Errors of the device that say nothing about a kernel.
    pub fn fallback(&self, gpu: Gpu, options: &Options) -> Result<Gpu, OpError> {
        let Ok(units) = gpu.matrix_units() else { return Ok(gpu) };
        let verdict = |test: &MixedTest<'_>| match test.kept() {
            Some(kept) => Ok(kept.err()),
            None => test.run(&gpu).map_or_else(|error| reason(&error).ok_or(error).map(Some), |()| Ok(None)),
        };
        let tests = self.tests(&gpu, units)?;
        mixed_test::compile(tests.iter().filter(|test| test.kept().is_none()));
        let verdicts = tests.iter().map(verdict).find(|verdict| !matches!(verdict, Ok(None)));
        drop(tests);
        match verdicts.transpose()?.flatten() {
            None => Ok(gpu),
            Some(reason) => {
                // A kernel may have lost the device.
                drop(gpu);
                Ok(Gpu::open_without_matrix_units(options, &reason)?)
            }
        }
    }
}

#[cfg(test)]
mod tests;
