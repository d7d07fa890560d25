//! What the pieces of a conversion add up to.

use std::collections::{BTreeMap, HashMap};

use crate::convert::nesting::Wanted;
use crate::convert::report::{Kept, RoleSums};
use crate::format::{PieceCrc, Role};

/// What the pieces add up to. Pieces are absorbed in file order, so that nothing depends on the
/// number of threads.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) crcs: Vec<PieceCrc>,
    pub(super) signed: bool,
    pub(super) roles: BTreeMap<Role, RoleSums>,
    /// Scales of the `dq8` tensors whose first pass is under way.
    pub(super) wanted: HashMap<usize, Wanted>,
    pub(super) hashes: Vec<String>,
    pub(super) done: u64,
    /// What an interrupted run had kept.
    pub(super) kept: Option<Kept>,
}
