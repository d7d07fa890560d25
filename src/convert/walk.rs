//! Cuts a source file into windows that are read one after the other, and each window into pieces
//! that are worked on in parallel. Every byte of the file is in exactly one piece, so that hashing
//! the windows in order hashes the file.

use std::ops::Range;

use super::source::{SourceFile, TensorInfo};

/// Weights of a piece: a multiple of every block size, small enough that a piece and its output
/// stay in the second-level cache of a core.
pub(super) const PIECE_WEIGHTS: u64 = 1 << 17;

/// Bytes of a piece that belongs to no tensor (the header).
const PLAIN_PIECE: u64 = 1 << 20;

/// A run of bytes of a source file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it starts in the file.
    pub offset: u64,
    /// Its bytes.
    pub len: usize,
    /// The tensor that it is of, by number in the checkpoint; `None` for the header.
    pub tensor: Option<usize>,
    /// Its first element in the tensor.
    pub first: u64,
}

/// Pieces that are read together: `len` bytes from `offset` on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Window {
    pub offset: u64,
    pub len: usize,
    pub pieces: Vec<Piece>,
}

impl Window {
    /// Where one of its pieces lies among its bytes.
    pub(super) fn range_of(&self, piece: &Piece) -> Range<usize> {
        let from = (piece.offset - self.offset) as usize;
        from..from + piece.len
    }
}

/// The windows of a file from `start` on, where a piece begins, each of at most `window_len` bytes
/// (or one piece, where that is longer).
pub(super) fn windows<'a>(
    file: &'a SourceFile,
    tensors: &'a [TensorInfo],
    start: u64,
    window_len: usize,
) -> impl Iterator<Item = Window> + 'a {
    let mut pieces = pieces(file, tensors).skip_while(move |piece| piece.offset < start).peekable();
    std::iter::from_fn(move || {
        let first = pieces.next()?;
        let mut window = Window { offset: first.offset, len: first.len, pieces: vec![first] };
        while let Some(piece) = pieces.next_if(|p| window.len + p.len <= window_len) {
            window.len += piece.len;
            window.pieces.push(piece);
        }
        Some(window)
    })
}

/// All pieces of a file in order; a checked safetensors file has no holes, but a hole would be a
/// piece, too.
fn pieces<'a>(file: &'a SourceFile, tensors: &'a [TensorInfo]) -> impl Iterator<Item = Piece> + 'a {
    let mut end = 0;
    let numbered = file.tensors.clone().zip(tensors.get(file.tensors.clone()).unwrap_or_default());
    let in_file = numbered.flat_map(move |(number, tensor)| {
        let gap = plain(end, tensor.offset);
        end = tensor.offset + tensor.length;
        gap.chain(tensor_pieces(number, tensor))
    });
    let last = file.tensors.clone().next_back().and_then(|n| tensors.get(n));
    let tail = last.map_or(0, |t| t.offset + t.length);
    in_file.chain(plain(tail, file.length))
}

fn plain(start: u64, end: u64) -> impl Iterator<Item = Piece> {
    let starts = (start..end.max(start)).step_by(PLAIN_PIECE as usize);
    starts.map(move |offset| Piece { offset, len: (end - offset).min(PLAIN_PIECE) as usize, tensor: None, first: 0 })
}

/// The pieces of one tensor.
pub(super) fn tensor_pieces(number: usize, tensor: &TensorInfo) -> impl Iterator<Item = Piece> + use<> {
    let (start, length, element) = (tensor.offset, tensor.length, tensor.float_type.size() as u64);
    let piece_len = PIECE_WEIGHTS * element;
    (0..length.div_ceil(piece_len)).map(move |i| {
        let from = i * piece_len;
        let len = (length - from).min(piece_len) as usize;
        Piece { offset: start + from, len, tensor: Some(number), first: i * PIECE_WEIGHTS }
    })
}
