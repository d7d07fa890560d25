//! The `.nf4pack` file format: bytes in, validated views out; a plan in, bytes out. No paths, no
//! threads, no GPU.
//!
//! `spec/nf4pack-format.md` is the only authority on the bytes; this code cites its sections.
//! [`Index::parse`] validates once; after that the accessors of [`Pack`] cannot fail; [`check`] has
//! the checks that opening skips; [`Layout`] gives every section of a new file its place.

pub mod check;
mod checksum;
mod error;
pub mod files;
mod header;
mod index;
mod kinds;
pub mod layout;
pub mod nf4;
mod pack;
mod provenance;
mod section;
mod writer;

pub use checksum::{PieceCrc, crc32};
pub use error::{Field, FormatError, Part};
pub use header::Header;
pub use index::Index;
pub use kinds::{ElementType, FloatType, Role, SectionKind};
pub use layout::Limits;
pub use pack::{EmbeddedFile, Layer, Pack, QuantizedTensor, RawTensor};
pub use provenance::{Provenance, SourceRecord};
pub use section::{Section, Shape};
pub use writer::{Entry, Layout, Storage};
