//! Tests every fast kernel against the CPU, once per device.

use half::{bf16, f16};

use super::error::DequantError;
use super::kernel::{Fast, Kernels, Path};
use super::output::Output;
use super::sample::Sample;
use super::weights::GpuWeights;
use super::{dequantize, dequantize_bf16, dequantize_f16};
use crate::format::nf4::{Nf4Tensor, ScaleType};
use crate::gpu::{BufferRange, GpuError};

/// All scale types.
const SCALE_TYPES: [ScaleType; 3] = [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8];
/// Elements of the test tensors: more than two workgroups, with a partial one. Not a multiple of 8.
const ELEMENTS: u64 = 3 * 8192 + 1003;
/// Block size of the test tensors. They have more scales than one super-scale covers.
const BLOCK_SIZE: u32 = 64;

/// A kernel, by its output type and scale type.
pub(super) type Which = (Output, ScaleType);

/// Every kernel.
pub(super) fn every_kernel() -> impl Iterator<Item = Which> {
    Output::ALL.into_iter().flat_map(|output| SCALE_TYPES.map(|scale_type| (output, scale_type)))
}

/// Why some fast kernels are not used. Unlisted kernels are used.
#[derive(Debug, Clone, Default)]
pub(super) struct Verdicts(Vec<(Which, String)>);

impl Verdicts {
    /// Why the fast kernel is not used, or `None` if it is.
    pub fn refusal(&self, output: Output, scale_type: ScaleType) -> Option<&str> {
        self.0.iter().find(|(which, _)| *which == (output, scale_type)).map(|(_, reason)| reason.as_str())
    }
}

impl Verdicts {
    /// As JSON: indices of kernels in [`every_kernel`], and reasons.
    fn to_record(&self) -> Vec<u8> {
        let number = |which: &Which| every_kernel().position(|w| w == *which);
        let rows: Vec<_> = self.0.iter().map(|(which, reason)| (number(which), reason)).collect();
        serde_json::to_vec(&rows).unwrap_or_default()
    }

    /// `None` if `record` is not from [`Verdicts::to_record`].
    fn from_record(record: &[u8]) -> Option<Self> {
        let rows: Vec<(usize, String)> = serde_json::from_slice(record).ok()?;
        rows.into_iter().map(|(number, reason)| Some((every_kernel().nth(number)?, reason))).collect::<Option<_>>().map(Self)
    }
}

/// The stored results for these kernels on this adapter and driver, or the results of a new test.
pub(super) fn recall_or_run(kernels: &Kernels) -> Result<Verdicts, DequantError> {
    let find = || verdicts(kernels);
    kernels.gpu().recall_or_find(kernels.sources(), Verdicts::from_record, Verdicts::to_record, find)
}

/// Tests the fast kernels, and the plain kernel for each failure.
fn verdicts(kernels: &Kernels) -> Result<Verdicts, DequantError> {
    let all: Vec<Which> = every_kernel().collect();
    let refused = if kernels.setup().fast != Fast::Off {
        failures(kernels, Path::Fast, &all)?
    } else {
        all.into_iter().map(|which| (which, "the plain kernels were requested".to_owned())).collect()
    };
    if refused.is_empty() {
        return Ok(Verdicts(refused));
    }
    let plain: Vec<Which> = refused.iter().map(|(which, _)| *which).collect();
    match failures(kernels, Path::Plain, &plain)?.into_iter().next() {
        None => Ok(Verdicts(refused)),
        Some(((output, _), reason)) => Err(DequantError::Unfit { output, reason }),
    }
}

/// The kernels among `which` that do not compile or give a wrong value, and the reason.
fn failures(kernels: &Kernels, path: Path, which: &[Which]) -> Result<Vec<(Which, String)>, DequantError> {
    let gpu = kernels.gpu();
    let mut commands = gpu.commands("self-test");
    let (mut failures, mut trials) = (Vec::new(), Vec::new());
    for &(output, scale_type) in which {
        let sample = Sample::new(scale_type, ELEMENTS, BLOCK_SIZE);
        let tensor = sample.tensor();
        let weights = GpuWeights::upload(gpu, &tensor)?;
        let poison = vec![0xaa; output.bytes(ELEMENTS) as usize];
        let out = BufferRange::whole(gpu.storage_with("self-test", &poison)?);
        match kernels.record(path, &mut commands, &weights, 0..ELEMENTS, output, &out) {
            Ok(()) => trials.push(((output, scale_type), out, reference(&tensor, output))),
            Err(DequantError::Gpu(e @ (GpuError::Invalid { .. } | GpuError::KernelLimit { .. }))) => {
                failures.push(((output, scale_type), e.to_string()));
            }
            Err(e) => return Err(e),
        }
    }
    commands.submit()?;
    for (which, out, expected) in trials {
        let found = gpu.read(&out)?;
        failures.extend(difference(which.0, &found, &expected).map(|reason| (which, reason)));
    }
    Ok(failures)
}

/// All elements of a tensor as little-endian bytes.
fn reference(tensor: &Nf4Tensor<'_>, output: Output) -> Vec<u8> {
    let len = tensor.elements as usize;
    let (mut f32s, mut f16s, mut bf16s) = (vec![0.0; len], vec![f16::ZERO; len], vec![bf16::ZERO; len]);
    // The lengths of the sample are right by construction. If they were wrong, zeros would fail the
    // kernel.
    match output {
        Output::F32 => drop(dequantize(tensor, 0, &mut f32s)),
        Output::F16 => drop(dequantize_f16(tensor, 0, &mut f16s)),
        Output::Bf16 => drop(dequantize_bf16(tensor, 0, &mut bf16s)),
    }
    match output {
        Output::F32 => f32s.into_iter().flat_map(f32::to_le_bytes).collect(),
        Output::F16 => f16s.into_iter().flat_map(f16::to_le_bytes).collect(),
        Output::Bf16 => bf16s.into_iter().flat_map(bf16::to_le_bytes).collect(),
    }
}

/// Describes the first element that differs.
fn difference(output: Output, found: &[u8], expected: &[u8]) -> Option<String> {
    let size = output.element_bytes() as usize;
    let pairs = found.chunks(size).zip(expected.chunks(size)).enumerate();
    let hex = |bytes: &[u8]| bytes.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
    let mut wrong = pairs.filter(|(_, (found, expected))| found != expected);
    let (i, (found, expected)) = wrong.next()?;
    let more = wrong.count();
    Some(format!("element {i} is 0x{} instead of 0x{}, and {more} more are wrong", hex(found), hex(expected)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::nf4;

    #[test]
    fn verdicts_come_back_from_their_record() {
        for refused in [
            vec![],
            vec![((Output::F16, ScaleType::Dq8), "no".to_owned()), ((Output::F32, ScaleType::F32), "\"".to_owned())],
        ] {
            let record = Verdicts(refused.clone()).to_record();
            assert_eq!(Verdicts::from_record(&record).unwrap().0, refused);
        }
        for bad in ["", "[[9,\"\"]]", "[[null,\"\"]]", "[[0]]"] {
            assert!(Verdicts::from_record(bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[test]
    fn samples_are_whole_and_differences_are_found() {
        for scale_type in SCALE_TYPES {
            let sample = Sample::new(scale_type, ELEMENTS, BLOCK_SIZE);
            assert_eq!(sample.tensor().scales.len() as u64, nf4::block_count(ELEMENTS, BLOCK_SIZE));
            for output in Output::ALL {
                let expected = reference(&sample.tensor(), output);
                assert_eq!(expected.len() as u64, ELEMENTS * output.element_bytes());
                assert!(expected.iter().filter(|&&byte| byte != 0).count() > expected.len() / 2);
                assert_eq!(difference(output, &expected, &expected), None);
                let mut wrong = expected.clone();
                *wrong.last_mut().unwrap() ^= 1;
                assert!(difference(output, &wrong, &expected).unwrap().starts_with(&format!("element {} ", ELEMENTS - 1)));
            }
        }
    }
}
