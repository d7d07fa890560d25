//! See [`crate::arch::config`].

pub use crate::arch::config::*;
