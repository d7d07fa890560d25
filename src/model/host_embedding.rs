//! An embedding table that is not in GPU memory: the rows of a batch are read from the pack, and
//! uploaded as float32. They have the bits that the kernel gathers from a table in GPU memory.

use std::sync::Arc;

use rayon::prelude::*;

use crate::arch::config::ModelConfig;
use crate::format::{Role, Section, SectionKind};
use crate::gpu::{Gpu, GpuError, Uploader};
use crate::model::error::ModelError;
use crate::ops::{Mat, OpError, mat_bytes};
use crate::source::{PackSource, ReadError, RowBuf};

/// Staging memory: buffers, and bytes of each.
const CHUNKS: usize = 3;
const CHUNK: u64 = 8 << 20;
/// Rows that a thread reads at a time. Their floats have a multiple of 8 bytes.
const ROWS: usize = 64;

/// The embedding table of a pack, with staging memory.
#[derive(Debug)]
pub(super) struct HostEmbedding {
    source: Arc<PackSource>,
    /// The section of the table.
    section: usize,
    columns: u32,
    uploader: Uploader,
}

/// A failure to read or to upload.
#[derive(Debug)]
enum Failure {
    Read(ReadError),
    Gpu(GpuError),
}

impl From<GpuError> for Failure {
    fn from(error: GpuError) -> Self {
        Self::Gpu(error)
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

impl From<Failure> for ModelError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Read(error) => error.into(),
            Failure::Gpu(error) => OpError::from(error).into(),
        }
    }
}

impl HostEmbedding {
    /// Bytes of the staging buffers.
    pub fn staging_bytes() -> u64 {
        CHUNK * CHUNKS as u64
    }

    /// Finds the table, and compares its checksum unless the pack is unverified.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::TensorShape`], [`ModelError::Stream`].
    pub fn new(gpu: &Gpu, source: Arc<PackSource>, model: &ModelConfig) -> Result<Self, ModelError> {
        let role = Role::Embedding;
        let is =
            |section: &Section| section.layer.is_none() && section.role == role && section.kind == Some(SectionKind::Raw);
        let missing = ModelError::MissingTensor { layer: None, role };
        let Some(number) = source.index().sections().iter().position(is) else { return Err(missing) };
        let found = source.index().sections()[number].shape.dims().to_vec();
        let expected = vec![model.vocab.into(), model.hidden.into()];
        if found != expected {
            return Err(ModelError::TensorShape { layer: None, role, expected, found });
        }
        source.check_payload(number)?;
        Ok(Self { source, section: number, columns: model.hidden, uploader: Uploader::new(gpu, CHUNK, CHUNKS) })
    }

    /// Submits the upload of the rows of `tokens` to `out` [tokens, hidden]. The caller has checked
    /// the tokens against the vocabulary.
    ///
    /// # Errors
    /// [`ModelError::Op`], [`ModelError::Stream`].
    pub fn upload(&mut self, tokens: &[u32], out: &Mat) -> Result<(), ModelError> {
        let (expected, found) = (u64::from(out.rows), tokens.len() as u64);
        if found != expected {
            let what = "the number of tokens that the host knows";
            return Err(OpError::Shape { operation: "an embedding in host memory", what, expected, found }.into());
        }
        self.source.check_len()?;
        let Self { source, section, columns, uploader } = self;
        let width = mat_bytes(1, *columns);
        let at_once = ((uploader.chunk() / width.max(1)) as usize / ROWS * ROWS).max(1);
        for (first, ids) in (0..).step_by(at_once).zip(tokens.chunks(at_once)) {
            let target = out.range.slice(first * width, ids.len() as u64 * width);
            uploader.copy::<Failure>(&target, |area| {
                let rows = ids.par_chunks(ROWS).enumerate();
                rows.try_for_each_init(Default::default, |(buf, floats): &mut (RowBuf, Vec<f32>), (i, ids)| {
                    floats.clear();
                    source.rows(*section, ids, buf, floats)?;
                    Ok(area.write((i * ROWS) as u64 * width, bytemuck::cast_slice(floats))?)
                })
            })?;
        }
        Ok(())
    }
}
