//! What only lives while a template is rendered: loops, macros, namespaces, generators.

use std::collections::VecDeque;
use std::sync::Arc;

use super::ast::{For, Macro};
use super::value::{Dict, Value};

#[derive(Debug)]
pub(super) enum Object {
    Namespace(Dict),
    /// What can be gone through once.
    Generator(VecDeque<Value>),
    Loop(Loop),
    /// A macro and the scope that it was defined in.
    Macro(Arc<Macro>, usize),
    Cycler(Vec<Value>, usize),
    /// A separator, and whether it was used before.
    Joiner(Value, bool),
}

/// The state of a loop.
#[derive(Debug)]
pub(super) struct Loop {
    pub(super) definition: Arc<For>,
    /// The scope around it.
    pub(super) scope: usize,
    /// Items that are still to come, before the loop's own condition.
    pub(super) pending: VecDeque<Value>,
    /// Items that passed it.
    pub(super) ready: VecDeque<Value>,
    pub(super) before: Option<Value>,
    pub(super) current: Option<Value>,
    pub(super) index0: usize,
    /// Loops around it that called it.
    pub(super) depth0: usize,
    pub(super) changed: Option<Vec<Value>>,
}
