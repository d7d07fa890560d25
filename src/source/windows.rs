//! Windows into payloads that may be larger than the memory: scales and code padding.

use super::{PackSource, ReadError};
use crate::format::nf4::{SUPER_BLOCK, ScaleType, Scales, block_count};
use crate::format::{FormatError, Section, SectionKind, check};
use crate::io::AlignedBuf;

/// Scales that are checked at a time: whole super-blocks.
const WINDOW_SCALES: u64 = 1 << 16;

/// Buffers of a window, reused from window to window.
#[derive(Debug, Default)]
pub(crate) struct WindowBuf {
    #[cfg(feature = "convert")]
    pub(super) codes: AlignedBuf,
    pub(super) scales: ScaleBuf,
}

#[derive(Debug, Default)]
pub(super) struct ScaleBuf {
    fixed: AlignedBuf,
    super_scales: AlignedBuf,
    scales: AlignedBuf,
}

impl PackSource {
    /// Checks the scales or the code padding of section `number`, window by window. Calls `go_on`
    /// between windows, and ends early if it returns `false`.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] with the first violation; if the file cannot be read.
    pub(crate) fn check_contents(
        &self,
        number: usize,
        buf: &mut WindowBuf,
        go_on: impl Fn() -> bool,
    ) -> Result<(), ReadError> {
        let index = self.index();
        let Some(section) = index.sections().get(number) else { return Ok(()) };
        match section.kind {
            Some(SectionKind::Scales) => {
                let blocks = block_count(section.shape.elements(), section.block_size);
                let mut first = 0;
                while first < blocks && go_on() {
                    let count = (blocks - first).min(WINDOW_SCALES);
                    let scales = self.scales(section, first, count, &mut buf.scales)?;
                    check::scale_values(index, number, section, first, &scales).map_err(|e| self.damaged(e))?;
                    first += count;
                }
                Ok(())
            }
            Some(SectionKind::Codes) => {
                let first = section.shape.elements() / 2;
                let tail = self.bytes(section.offset + first, section.length - first, &mut buf.scales.scales)?;
                check::code_padding(index, number, section, first, tail).map_err(|e| self.damaged(e))
            }
            _ => Ok(()),
        }
    }

    /// `count` scales of a scale table from number `first` on, a multiple of [`SUPER_BLOCK`].
    pub(super) fn scales<'a>(
        &'a self,
        section: &Section,
        first: u64,
        count: u64,
        buf: &'a mut ScaleBuf,
    ) -> Result<Scales<'a>, ReadError> {
        let offset = section.offset;
        match section.scale_type {
            Some(ScaleType::F32) => Ok(Scales::F32(self.bytes(offset + 4 * first, 4 * count, &mut buf.scales)?)),
            Some(ScaleType::Bf16) => Ok(Scales::Bf16(self.bytes(offset + 2 * first, 2 * count, &mut buf.scales)?)),
            Some(ScaleType::Dq8) => {
                let (fixed_len, per_super) = (Scales::DQ8_FIXED_LEN as u64, SUPER_BLOCK as u64);
                let fixed = self.bytes(offset, fixed_len, &mut buf.fixed)?;
                let of_table = |fixed: &'a [u8]| fixed.split_first_chunk().map(|(o, map)| (f32::from_le_bytes(*o), map));
                let (table_offset, map) = of_table(fixed).unwrap_or((f32::NAN, &[]));
                let supers = offset + fixed_len;
                let from = supers + 4 * (first / per_super);
                let super_scales = self.bytes(from, 4 * count.div_ceil(per_super), &mut buf.super_scales)?;
                let blocks = block_count(section.shape.elements(), section.block_size);
                let codes = supers + 4 * blocks.div_ceil(per_super) + first;
                let codes = self.bytes(codes, count, &mut buf.scales)?;
                Ok(Scales::Dq8 { offset: table_offset, map, super_scales, codes })
            }
            None => Err(self.damaged(FormatError::Unpaired { section: section.name, offset })),
        }
    }
}
