//! Views into the bytes of a pack whose index has been validated; none of them can fail.

use std::ops::Range;

use super::error::FormatError;
use super::index::Index;
use super::kinds::{FloatType, Role, SectionKind};
use super::nf4;
use super::section::{Section, Shape};

/// A whole pack: its bytes (mapped or in memory) and its validated index. Copying it copies two
/// references.
///
/// ```
/// use nf4pack::format::{Index, Pack};
///
/// # fn main() -> Result<(), nf4pack::format::FormatError> {
/// # let bytes = nf4pack::format::Layout::new(Vec::new(), 0, 2)?.assemble(&[], "{}")?;
/// let index = Index::parse(&bytes, bytes.len() as u64)?;
/// let pack = Pack::new(&bytes, &index)?;
/// for layer in pack.layers() {
///     for tensor in layer.quantized_tensors() {
///         println!("{} {}", tensor.name, tensor.shape);
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Pack<'a> {
    bytes: &'a [u8],
    index: &'a Index,
}

/// A quantised weight matrix (or stack of matrices).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuantizedTensor<'a> {
    /// The tensor's name in the checkpoint.
    pub name: &'a str,
    /// What it is for.
    pub role: Role,
    /// Its layer; `None` for a global one such as a quantised lm_head.
    pub layer: Option<u32>,
    /// Its expert, if there is one tensor per expert.
    pub expert: Option<u32>,
    /// Shape in the checkpoint: [out, in], or [experts, ..] for a stack.
    pub shape: &'a Shape,
    /// Codes and scales.
    pub data: nf4::Nf4Tensor<'a>,
}

/// A tensor in its own float type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RawTensor<'a> {
    /// The tensor's name in the checkpoint.
    pub name: &'a str,
    /// What it is for.
    pub role: Role,
    /// Its layer, if any.
    pub layer: Option<u32>,
    /// Its expert, if any.
    pub expert: Option<u32>,
    /// Shape in the checkpoint.
    pub shape: &'a Shape,
    /// Type of the elements.
    pub float_type: FloatType,
    /// Little-endian elements, row-major.
    pub bytes: &'a [u8],
}

/// A file of the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbeddedFile<'a> {
    /// File name, without a folder.
    pub name: &'a str,
    /// Its bytes, as they were.
    pub bytes: &'a [u8],
}

/// One layer: all its sections lie next to each other.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    pack: Pack<'a>,
    number: u32,
}

impl<'a> Pack<'a> {
    /// Joins the bytes of a whole file with the index that was parsed from it.
    ///
    /// # Errors
    /// [`FormatError::FileLength`] where the index is of a file of another length.
    pub fn new(bytes: &'a [u8], index: &'a Index) -> Result<Self, FormatError> {
        let (expected, found) = (index.header().file_len, bytes.len() as u64);
        if expected != found {
            return Err(FormatError::FileLength { expected, found });
        }
        Ok(Self { bytes, index })
    }

    /// The view of a mapping whose index was parsed from that very mapping.
    #[cfg(feature = "mmap")]
    pub(crate) fn of_mapped(bytes: &'a [u8], index: &'a Index) -> Self {
        Self { bytes, index }
    }

    /// The validated index.
    pub fn index(&self) -> &'a Index {
        self.index
    }

    /// The whole file.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The payload of one of this pack's sections.
    pub fn payload(&self, section: &Section) -> &'a [u8] {
        self.bytes.get(section.offset as usize..section.end() as usize).unwrap_or_default()
    }

    /// Number of layers.
    pub fn layer_count(&self) -> u32 {
        self.index.header().layer_count
    }

    /// Layer `number`, from 0; `None` past the last one.
    pub fn layer(self, number: u32) -> Option<Layer<'a>> {
        (number < self.layer_count()).then_some(Layer { pack: self, number })
    }

    /// All layers in order.
    pub fn layers(self) -> impl Iterator<Item = Layer<'a>> + use<'a> {
        (0..self.layer_count()).map(move |number| Layer { pack: self, number })
    }

    /// Every quantised tensor of the file, in file order.
    pub fn quantized_tensors(self) -> impl Iterator<Item = QuantizedTensor<'a>> + use<'a> {
        self.quantized_tensors_in(0..self.index.sections().len())
    }

    /// Every raw tensor of the file, in file order.
    pub fn raw_tensors(self) -> impl Iterator<Item = RawTensor<'a>> + use<'a> {
        self.raw_tensors_in(0..self.index.sections().len())
    }

    /// The embedded files, in file order.
    pub fn files(self) -> impl Iterator<Item = EmbeddedFile<'a>> + use<'a> {
        let files = self.index.sections().iter().filter(|s| s.kind == Some(SectionKind::File));
        files.map(move |s| EmbeddedFile { name: self.index.name(s), bytes: self.payload(s) })
    }

    /// The embedded file with this name.
    pub fn file(self, name: &str) -> Option<EmbeddedFile<'a>> {
        self.files().find(|file| file.name == name)
    }

    /// The quantised tensor with this name.
    pub fn quantized_tensor(self, name: &str) -> Option<QuantizedTensor<'a>> {
        self.quantized_tensors().find(|p| p.name == name)
    }

    /// The raw tensor with this name.
    pub fn raw_tensor(self, name: &str) -> Option<RawTensor<'a>> {
        self.raw_tensors().find(|t| t.name == name)
    }

    /// Whether a tensor outside the layers has this role, quantised or not.
    pub fn has(self, role: Role) -> bool {
        self.index.has(role)
    }

    fn quantized_tensors_in(self, range: Range<usize>) -> impl Iterator<Item = QuantizedTensor<'a>> + use<'a> {
        // Validation made sure that every codes section stands right before its scales.
        let pairs = self.index.sections().get(range).unwrap_or_default().windows(2);
        pairs.filter(|pair| pair[0].kind == Some(SectionKind::Codes)).filter_map(move |pair| {
            let section = &pair[0];
            let blocks = nf4::block_count(section.shape.elements(), section.block_size) as usize;
            Some(QuantizedTensor {
                name: self.index.name(section),
                role: section.role,
                layer: section.layer,
                expert: section.expert,
                shape: &section.shape,
                data: nf4::Nf4Tensor {
                    codes: self.payload(section),
                    scales: nf4::Scales::from_payload(self.payload(&pair[1]), section.scale_type?, blocks)?,
                    block_size: section.block_size,
                    elements: section.shape.elements(),
                },
            })
        })
    }

    fn raw_tensors_in(self, range: Range<usize>) -> impl Iterator<Item = RawTensor<'a>> + use<'a> {
        let sections = self.index.sections().get(range).unwrap_or_default().iter();
        sections.filter(|s| s.kind == Some(SectionKind::Raw)).filter_map(move |section| {
            Some(RawTensor {
                name: self.index.name(section),
                role: section.role,
                layer: section.layer,
                expert: section.expert,
                shape: &section.shape,
                float_type: section.element_type.float_type()?,
                bytes: self.payload(section),
            })
        })
    }
}

impl<'a> Layer<'a> {
    /// The pack that the layer is of.
    pub fn pack(&self) -> Pack<'a> {
        self.pack
    }

    /// The layer's number, from 0.
    pub fn number(&self) -> u32 {
        self.number
    }

    fn range(&self) -> Range<usize> {
        self.pack.index.layers().get(self.number as usize).cloned().unwrap_or_default()
    }

    /// The layer's sections, in file order.
    pub fn sections(&self) -> &'a [Section] {
        self.pack.index.sections().get(self.range()).unwrap_or_default()
    }

    /// Where the layer lies in the file: from a multiple of 4096 to the end of its last section.
    pub fn file_range(&self) -> Range<u64> {
        self.pack.index.layer_range(self.number).unwrap_or_default()
    }

    /// The layer's bytes: one sequential read, one copy to a GPU buffer, in which each section
    /// starts on a multiple of 256.
    pub fn bytes(&self) -> &'a [u8] {
        let range = self.file_range();
        self.pack.bytes.get(range.start as usize..range.end as usize).unwrap_or_default()
    }

    /// The layer's quantised tensors, in file order.
    pub fn quantized_tensors(&self) -> impl Iterator<Item = QuantizedTensor<'a>> + use<'a> {
        self.pack.quantized_tensors_in(self.range())
    }

    /// The layer's raw tensors (norms, biases, routers), in file order.
    pub fn raw_tensors(&self) -> impl Iterator<Item = RawTensor<'a>> + use<'a> {
        self.pack.raw_tensors_in(self.range())
    }

    /// The layer's quantised tensor of a role; with experts, the first one.
    pub fn quantized_tensor(&self, role: Role) -> Option<QuantizedTensor<'a>> {
        self.quantized_tensors().find(|p| p.role == role)
    }
}
