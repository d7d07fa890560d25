//! Tensors of a streamed layer as operands of the kernels, with their shapes checked.

use crate::arch::config::TensorRows;
use crate::dequant::stream::StreamedLayer;
use crate::format::Role;
use crate::model::error::ModelError;
use crate::ops::matmul::{Elements, Weight};

/// The elements of a tensor of this shape, quantised or raw.
pub(super) fn elements<'a>(layer: &'a StreamedLayer, role: Role, expected: &[u64]) -> Result<Elements<'a>, ModelError> {
    if let Some(quantised) = layer.quantized_tensor(role) {
        check_shape(layer, role, quantised.shape.dims(), expected)?;
        return Ok(Elements::Quantized(&quantised.weights));
    }
    let tensor = layer.raw_tensor(role).ok_or(ModelError::MissingTensor { layer: layer.number, role })?;
    check_shape(layer, role, tensor.shape.dims(), expected)?;
    Ok(Elements::Raw { float_type: tensor.float_type, parts: &tensor.parts })
}

fn check_shape(layer: &StreamedLayer, role: Role, found: &[u64], expected: &[u64]) -> Result<(), ModelError> {
    match found == expected {
        true => Ok(()),
        false => {
            let (layer, expected, found) = (layer.number, expected.to_vec(), found.to_vec());
            Err(ModelError::TensorShape { layer, role, expected, found })
        }
    }
}

/// A projection of the layer, quantised or raw.
pub(super) fn projection<'a>(layer: &'a StreamedLayer, rows: &TensorRows) -> Result<Weight<'a>, ModelError> {
    let whole = weight(layer, rows.tensor, rows.outputs, rows.inputs)?;
    Ok(whole.rows(rows.first..rows.first.saturating_add(rows.count)))
}

/// A weight [outputs, inputs], quantised or raw.
pub(super) fn weight<'a>(layer: &'a StreamedLayer, role: Role, outputs: u32, inputs: u32) -> Result<Weight<'a>, ModelError> {
    let elements = elements(layer, role, &[outputs.into(), inputs.into()])?;
    Ok(Weight::new(elements, outputs, inputs))
}
